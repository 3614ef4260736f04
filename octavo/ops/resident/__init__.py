"""CUDA C++ for sm_90: decode steps in few launches (kernel.cu, between.cu), attention over FP8 (prefill.cu, decode.cu)."""
