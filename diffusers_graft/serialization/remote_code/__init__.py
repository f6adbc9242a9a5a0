"""Operators and models that travel with their source code."""
