"""The page that shows a server to people: its files, and how they are handed out."""
