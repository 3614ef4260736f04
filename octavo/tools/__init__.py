"""The commands beside `serve`, one folder each."""
