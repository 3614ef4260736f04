"""The speed of each op of octavo.ops beside its library's and the machine's limit: `python -m bench.ops`."""
