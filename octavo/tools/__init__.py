"""The commands beside `serve`: a folder a command."""
