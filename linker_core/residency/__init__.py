"""Which tensors are on the device, and who owns them."""
