"""Layers. Each owns its weights and loads them from the checkpoint at its path."""
