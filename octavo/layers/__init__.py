"""Layers: each owns its weights and reads them from the checkpoint at its own path."""
