"""The engine's Python interfaces: AsyncEngine over an engine process, LLM over one in this process. Nothing imports torch."""
