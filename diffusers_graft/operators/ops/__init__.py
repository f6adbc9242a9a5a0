"""Functions that several operators compute with."""
