"""Triton kernels: one source for all vendors. Each computes what the torch reference of its contract computes."""
