"""The engine as a program uses it: AsyncEngine in a process of its own, LLM in this one. Nothing here imports torch."""
