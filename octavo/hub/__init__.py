"""Models by their names on the Hugging Face hub, and the hub's cache on disk."""
