"""How the tables became what they are, one step per file of `versions`."""
