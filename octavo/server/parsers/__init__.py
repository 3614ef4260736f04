"""What a model writes, taken apart: its reasoning, its content, its tool calls."""
