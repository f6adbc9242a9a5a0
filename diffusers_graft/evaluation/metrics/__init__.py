"""Metrics for `dg.evaluate`, one file each."""
