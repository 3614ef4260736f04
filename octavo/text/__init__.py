"""Tokenization, detokenization and chat templates. Nothing here imports torch."""
