"""How a process finds the other ranks of its engine, on one host or over several."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

import torch

from octavo.config import EngineConfig
from octavo.distributed import WAIT, TensorParallel, file_store, join
from octavo.engine.place import Place
from octavo.platform import Platform, detect

__all__ = ["Found", "device_and_ranks", "join_ranks"]

Found = tuple[Platform, TensorParallel] | None  # this process's device and ranks, where they are known


def device_and_ranks(config: EngineConfig, place: Place) -> tuple[Platform, TensorParallel]:
    """This process's device, and its place among the ranks of its engine. Waits for the others."""
    platform = detect(config.device, place.device, config.devices_here)
    return platform, join_ranks(config, place, platform)


def join_ranks(config: EngineConfig, place: Place, platform: Platform) -> TensorParallel:
    """This process among the ranks of its engine, of which as many as split a layer follow one another in a stage.

    Waits for the others.
    """
    stages = config.pipeline_parallel_size
    if place.interface:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", place.interface)
    at, pulse = (place.rank, place.size, lambda: _store(place), place.store, platform.device), place.pulse
    tp = join(*at, config.enable_expert_parallel, pulse.exchange, stages, pulse.meet)
    return replace(tp, whole_towers=config.mm_encoder_tp_mode == "data")


def _store(place: Place) -> Any:
    """Where the ranks say how each is reached: a file of one host, or rank 0's port, which it tells the others."""
    if not place.address:
        return file_store(place.store, place.size)
    store = torch.distributed.TCPStore  # type: ignore[attr-defined]
    if place.rank:
        return store(place.address, place.share(0), place.size, timeout=WAIT)
    family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
    with socket.create_server(("", 0), family=family) as listener:
        port: int = listener.getsockname()[1]
        number = os.dup(listener.fileno())
    made = store(place.address, port, place.size, True, timeout=WAIT, wait_for_workers=False, master_listen_fd=number)
    place.share(port)
    return made
