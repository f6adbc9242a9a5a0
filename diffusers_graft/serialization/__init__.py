"""Grafts and grafted models as files, and as repositories of the Hub."""
