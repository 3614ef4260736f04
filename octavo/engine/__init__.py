"""The engine: requests in, tokens out."""

import os

# Before torch loads its OpenMP: threads that spin while they wait take the cores from the process that they wait for. Beside
# one other busy process, a step of the demo model took twenty times as long with spinning threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where torch multiplies on a CPU, it keeps a product prepared for each number of tokens that it has seen, and oneDNN a kernel,
# up to 1,024 of both and half a gigabyte. Those of a model's decode and of some prefills are a few dozen.
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")
