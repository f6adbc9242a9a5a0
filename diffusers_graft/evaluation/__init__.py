"""Measuring a model: scores, latency, pictures."""
