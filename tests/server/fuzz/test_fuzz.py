"""Requests that nobody should send, hundreds of them, at a real server: none kills it, none stops another client's stream.

They are the same in each run. FUZZ_SEED makes others, FUZZ_REQUESTS and FUZZ_SECONDS more of them:

    FUZZ_SEED=$RANDOM FUZZ_REQUESTS=30000 FUZZ_SECONDS=600 python -m pytest -s tests/server/fuzz
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from server.fuzz.attack import attack
from server.fuzz.generator import Generator
from server.fuzz.images import ImageGenerator
from server.processes import Server
from server.vision_checkpoints import write_qwen3_vl

from octavo.server.parsers.reasoning import REASONING_PARSERS
from octavo.server.parsers.token_calls import TOKEN_FORMS
from octavo.server.parsers.tools import PARSERS
from octavo.server.parsers.xml_forms import FORMS

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "200"))
WITH_IMAGES = int(os.environ.get("FUZZ_REQUESTS", "400"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "120"))  # after which no further request is sent: a machine may be busy
SEED = int(os.environ.get("FUZZ_SEED", "9"))
CLIENTS = 2
FLAGS = ("--threads", "1", "--cpu-kv-cache-gib", "0.1")
FP8 = ("--quantization", "ptpc_fp8", "--kv-cache-dtype", "fp8")


def test_fuzz() -> None:
    print(f"FUZZ_SEED={SEED}")
    calls, thinking = (random.Random(SEED).choice(names) for names in ([*PARSERS, *FORMS, *TOKEN_FORMS], [*REASONING_PARSERS]))
    server = Server(*FLAGS, *FP8, "--tool-call-parser", calls, "--reasoning-parser", thinking)
    try:
        sources = [Generator(SEED * CLIENTS + number) for number in range(CLIENTS)]
        attack(server, sources, REQUESTS, SECONDS, f"FUZZ_SEED={SEED}")
    finally:
        server.stop()


def test_fuzz_of_images(tmp_path: Path) -> None:
    print(f"FUZZ_SEED={SEED}")
    write_qwen3_vl(tmp_path)
    server = Server("--model", str(tmp_path), *FLAGS, *FP8, "--max-model-len", "1024", "--mm-processor-cache-gb", "0.001")
    try:
        sources = [ImageGenerator(SEED * CLIENTS + number, server.port) for number in range(CLIENTS)]
        attack(server, sources, WITH_IMAGES, SECONDS, f"FUZZ_SEED={SEED}")
    finally:
        server.stop()
