"""Benchmarks a person runs: models, single operators, and PixArt-Sigma on a GPU."""
