"""octavo bench: throughput, latency, a running server, a profile."""
