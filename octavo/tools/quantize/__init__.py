"""octavo quantize: an FP8 checkpoint to keep."""
