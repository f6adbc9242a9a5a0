"""The entry point of the command line inside the package, for `python -m diffusers_graft`."""

from diffusers_graft_cli import build_parser, main

__all__ = ["build_parser", "main"]
