"""The engine: requests in, tokens out."""

import os

# Set before torch loads its OpenMP: threads that spin while waiting take cores from the process they wait for. Beside one
# other busy process, a step of the demo model took twenty times as long with spinning threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# For CPU products torch caches a prepared product, and oneDNN a kernel, per number of tokens: up to 1,024 of each, half a
# gigabyte. A model's decode and some prefills need a few dozen.
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")
