"""Tensor and pipeline parallelism: this process's rank, and its groups for collectives.

The groups are torch.distributed's (NCCL, RCCL, or gloo on CPUs), or threads in tests. NVLink multicast is not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.stages import CPU, HOST_LINES, Lines, Stages, finish_sending, make_lines

__all__ = ["WAIT", "Collectives", "ProcessGroup", "TensorParallel", "Unheard", "file_store", "join", "leave"]


class Collectives(Protocol):
    """Collectives among ranks. Every rank makes the same calls in the same order, with tensors of one shape and dtype."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, which may be written into `x`."""

    def max_reduce(self, x: Tensor) -> Tensor:
        """The largest `x` over ranks, element by element; it may be written into `x`."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in the order of ranks."""


def _unseen() -> None: ...


class ProcessGroup:
    """Processes of torch.distributed, by default all of them. `entering` is called before each collective."""

    def __init__(self, entering: Callable[[], None] = _unseen, group: torch.distributed.ProcessGroup | None = None):
        self._entering, self._group = entering, group

    def all_reduce(self, x: Tensor) -> Tensor:
        self._entering()
        torch.distributed.all_reduce(x, group=self._group)
        return x

    def max_reduce(self, x: Tensor) -> Tensor:
        self._entering()
        torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self._entering()
        found = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(self._group))]
        torch.distributed.all_gather(found, x.contiguous(), group=self._group)
        return found


class Unheard:
    """Of a rank that computes what it alone can, such as shapes: nothing is exchanged, and values that span ranks are wrong."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def max_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x]


SENTENCE = 1024
WAIT = timedelta(days=1)  # a rank may wait for another that writes a checkpoint; the API process sees those that hang


_joined: tuple[str, int, int] | None = None  # name, rank and size of torch.distributed's default group
_stage_groups: dict[int, list[torch.distributed.ProcessGroup]] = {}  # number of stages -> a group for each
_lines: dict[int, Lines] = {}  # number of stages -> this rank's


def join(
    rank: int,
    size: int,
    make_store: Callable[[], Any],
    name: str,
    device: torch.device,
    expert_parallel: bool = False,
    entering: Callable[[], None] = _unseen,
    stages: int = 1,
    meeting: Callable[[], None] = _unseen,
) -> TensorParallel:
    """This process as rank `rank` of `size` processes, on `device`. Waits until all have come.

    make_store: gives the torch.distributed.Store that all of them can write, and no earlier group has used. name: its own.
    A process that joined under the same name before, as the same rank, keeps its group; one that joined elsewhere leaves it
    first. stages: of a pipeline, into which ranks are split in their order. entering: called before each collective of a
    stage. meeting: called before each of all ranks where there are several stages.
    """
    global _joined
    cpu = device.type == "cpu"
    if not cpu:
        torch.accelerator.set_device_index(device)  # where kernels, graphs and collectives of this process go
    if size == 1:
        return TensorParallel()
    if _joined != (name, rank, size):  # else by an earlier engine of this process
        leave()
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        torch.distributed.init_process_group(
            "gloo" if cpu else "nccl" if stages == 1 else f"cpu:gloo,{device.type}:nccl",  # a message's header is the host's
            store=make_store(),
            rank=rank,
            world_size=size,
            timeout=WAIT,
            device_id=None if cpu else device,
        )
        _joined = name, rank, size
    if stages == 1:
        return TensorParallel(rank, size, ProcessGroup(entering), expert_parallel, device)
    split = size // stages
    if stages not in _stage_groups:  # every process makes all of them
        members = [list(range(first, first + split)) for first in range(0, size, split)]
        _stage_groups[stages] = [torch.distributed.new_group(ranks, timeout=WAIT) for ranks in members]
    number, own = divmod(rank, split)
    group = ProcessGroup(entering, _stage_groups[stages][number])
    everyone = TensorParallel(rank, size, ProcessGroup(meeting), device=device)
    if not cpu and stages not in _lines:
        _lines[stages] = make_lines(rank, size, split, WAIT)
    own_stage = Stages(number, stages, split, device, _lines.get(stages, HOST_LINES))
    return TensorParallel(own, split, group, expert_parallel, device, everyone=everyone, stages=own_stage)


def file_store(path: str, size: int) -> Any:
    """The torch.distributed.Store of `size` ranks of one host: a file that all of them can write, and no group has used."""
    return torch.distributed.FileStore(path, size)  # type: ignore[attr-defined]


# Ranks talk over the loopback, unless told otherwise: whatever its name resolves to does not matter. NCCL's NVLS needs
# multicast. torch warns of messages that wait for one another in a group; lines have one a direction (octavo/stages.py).
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
}


def leave() -> None:
    """Ends this process's membership, if it has any. Graphs that hold collectives must be gone by then."""
    global _joined
    _joined = None
    _stage_groups.clear()
    _lines.clear()
    finish_sending()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


ONE_STAGE = Stages()


@dataclass(frozen=True)
class TensorParallel:
    """This rank among `size`. With one rank every collective is the identity.

    expert_parallel: a rank has some of the routed experts whole, instead of a part of each. whole_towers: a rank has vision
    towers whole, for some of the images, instead of a part for all. stages: this rank's stage, whose ranks these are.
    everyone: all ranks of the engine, if there are several stages.
    """

    rank: int = 0
    size: int = 1
    group: Collectives | None = None
    expert_parallel: bool = False
    device: torch.device = CPU  # of tensors that are exchanged
    whole_towers: bool = False
    everyone: TensorParallel | None = None
    stages: Stages = ONE_STAGE

    @property
    def engine(self) -> TensorParallel:
        """All ranks of the engine, of every stage."""
        return self.everyone or self

    @property
    def of_towers(self) -> TensorParallel:
        """How vision towers are split."""
        return TensorParallel(device=self.device) if self.whole_towers else self

    def part(self, n: int) -> int:
        """This rank's share of `n` heads or channels; at least one, for KV heads that are replicated."""
        return max(1, n // self.size)

    def local_experts(self, count: int) -> range:
        """Which of `count` routed experts this rank has, whole or a part of each; the first ranks may have one more."""
        if not self.expert_parallel:
            return range(count)
        each, more = divmod(count, self.size)
        start, stop = (rank * each + min(rank, more) for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def _exchange(self) -> Collectives:
        assert self.group is not None, "ranks that exchange need a group"
        return self.group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over ranks."""
        return x if self.size == 1 else self._exchange().all_reduce(x)

    def max_reduce(self, x: Tensor) -> Tensor:
        """Largest `x` over ranks. Scales that span ranks are agreed on by it, so weight bytes do not depend on the size."""
        return x if self.size == 1 else self._exchange().max_reduce(x)

    def least(self, *numbers: int) -> list[int]:
        """The smallest of each number over ranks, on the host."""
        if self.size == 1:
            return list(numbers)
        return [-n for n in self.max_reduce(torch.tensor(numbers, device=self.device).neg()).tolist()]

    def sentences(self, text: str) -> list[str]:
        """Every rank's `text`, in rank order, of which the first SENTENCE bytes of UTF-8 are exchanged."""
        if self.size == 1:
            return [text]
        data = text.encode()[:SENTENCE].ljust(SENTENCE, b"\0")
        found = self._exchange().all_gather(torch.tensor(list(data), dtype=torch.uint8, device=self.device))
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in found]

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x`, concatenated along `dim` in rank order."""
        return x if self.size == 1 else torch.cat(self._exchange().all_gather(x), dim)
