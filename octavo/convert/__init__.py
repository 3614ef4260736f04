"""Quantized checkpoints made of others, a few megabytes at a time."""
