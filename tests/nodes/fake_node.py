"""A host of an engine of small deterministic cores: `python -m nodes.fake_node '{"option": value, ...}'`."""

from __future__ import annotations

import json
import sys

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.node import run_node

if __name__ == "__main__":
    from frontend.test_rank_processes import OnRank

    try:
        code = run_node(EngineConfig(**json.loads(sys.argv[1])), OnRank)
    except OctavoError as error:
        print(f"octavo: {error}")
        code = 1
    sys.exit(code)
