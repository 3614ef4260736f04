"""The engine: requests in, tokens out."""

import os

# Before torch loads its OpenMP: threads that spin while they wait take the cores from the process that they wait for. Beside
# one other busy process, a step of the demo model took twenty times as long with spinning threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
