"""CUDA C++ for sm_90: decode steps in few launches (decoder_megakernel.cu, layer_megakernel.cu), attention over FP8
(prefill_attention.cu, decode_attention.cu), and products of many tokens with what comes after them (gate_up_silu_gemm.cu,
qkv_rope_kv_write_gemm.cu)."""
