"""`linker demo`: a small family, trained on the spot, and a tour of what sharing saves."""

from server.cli.demo.command import add_arguments, run

__all__ = ["add_arguments", "run"]
