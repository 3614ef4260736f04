"""Decode steps of few requests in few launches: one of one request (csrc/kernel.cu), two a layer of up to 32 (between.cu)."""
