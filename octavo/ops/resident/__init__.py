"""A decode step of few requests as one launch: see csrc/kernel.cu."""
