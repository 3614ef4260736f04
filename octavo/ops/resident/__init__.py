"""CUDA C++ for sm_90: decode steps in few launches (kernel.cu, between.cu), attention over FP8 (prefill.cu, decode.cu), and
products of many tokens with what comes after them (gated.cu, qkv.cu)."""
