"""The server's side of the engine process."""
