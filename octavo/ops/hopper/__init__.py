"""CUDA C++ for sm_90: megakernels for decode steps (layer_megakernel.cu, moe_decode.cu), attention over an FP8 cache
(prefill_attention.cu, decode_attention.cu), GEMMs for many tokens with fused epilogues (gate_up_silu_gemm.cu,
qkv_rope_kv_write_gemm.cu), mixtures of experts (route.cu, grouped_gemm.cu, quantize_pairs.cu), and sums over ranks
(all_reduce.cu).
"""
