"""Kernels in Triton: one source for every vendor; each does what its contract's torch reference does."""
