"""A small family of models, trained on the spot, and the tour that `linker demo` gives of it."""
