"""The report of a run: one HTML file with its edits, curves, pictures and numbers."""
