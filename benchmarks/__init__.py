"""Benchmarks a person runs: whole models, single operators, and PixArt-Sigma on a GPU."""
