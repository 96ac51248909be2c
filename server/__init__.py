"""HTTP in, engine messages out. Knows no tensor."""
