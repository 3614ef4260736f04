"""octavo compare: what each FP8 scheme and KV cache costs in accuracy."""
