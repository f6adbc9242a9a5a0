"""Kernels in Triton, each beside its reference in plain torch. A module here is imported when its backend is used."""
