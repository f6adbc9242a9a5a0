"""Grafts in a model: building, installing and removing the new parts."""
