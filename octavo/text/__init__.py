"""Text to tokens and back, and chat templates. Nothing here imports torch."""
