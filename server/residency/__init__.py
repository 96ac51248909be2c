"""Which models are on the device: who uses them, who has to leave, who comes back."""
