"""Pipeline stages: which layers one has, and messages between ranks of unlike stages.

A message is a few tensors, of a device or of the host, behind a header that says which, their dtypes and shapes. Headers and
tensors of hosts go by gloo; those of devices by NCCL or RCCL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import torch
from torch import Tensor

from octavo.errors import OctavoError

__all__ = ["CPU", "HOST_LINES", "Lines", "Stages", "finish_sending", "make_lines"]

CPU = torch.device("cpu")

Sent: TypeAlias = deque[tuple[Tensor, torch.distributed.Work]]
_of_hosts, _of_devices = Sent(), Sent()  # oldest first; without these, what has not arrived is lost


def finish_sending() -> None:
    """Waits until everything that was sent has arrived."""
    for sent in (_of_hosts, _of_devices):
        while sent:
            sent.popleft()[1].wait()


@dataclass(frozen=True)
class Lines:
    """Groups of two ranks of unlike stages, each for messages of one direction between their devices: NCCL orders all messages
    of a group, so those of another direction would wait. before, onward: from the stage before, to the next. back: from the
    last stage to the first. None: the group of all ranks, as on hosts.
    """

    before: torch.distributed.ProcessGroup | None = None
    onward: torch.distributed.ProcessGroup | None = None
    back: torch.distributed.ProcessGroup | None = None


HOST_LINES = Lines()


def make_lines(rank: int, size: int, split: int, wait: timedelta) -> Lines:
    """The lines of `rank`. Every process makes all of them in one order."""
    hops = [("onward", "before", first, first + split) for first in range(size - split)]
    hops += [("back", "back", first, first + size - split) for first in range(split)]
    found = {}
    for name, at_other, first, other in hops:
        group = torch.distributed.new_group([first, other], timeout=wait, backend="nccl")
        if rank in (first, other):
            found[name if rank == first else at_other] = group
    return Lines(**found)


_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
_MOST_TENSORS, _MOST_DIMS = 6, 3  # of a message
_EACH = 3 + _MOST_DIMS  # numbers of a header: dtype, whether it is of the device, dimensions, shape
_HEADER = 1 + _MOST_TENSORS * _EACH
_MOST_SENT = 32  # tensors of hosts on their way, of eight steps or more


def _forget_arrived() -> None:
    """Frees what was sent: of devices when it has arrived, since states of long prompts are large; of hosts when it is old."""
    while _of_devices and _of_devices[0][1].is_completed():
        _of_devices.popleft()
    while len(_of_hosts) > _MOST_SENT:
        _of_hosts.popleft()[1].wait()


class Stages:
    """This rank's pipeline stage, `number` of `count`, each of `split` ranks, and its messages to ranks of others, which keep
    their order on a line.
    """

    def __init__(self, number: int = 0, count: int = 1, split: int = 1, device: torch.device = CPU, lines: Lines = HOST_LINES):
        self.number, self.count, self.split, self.device, self.lines = number, count, split, device, lines
        self.first, self.last = number == 0, number == count - 1
        self._beside = None if count == 1 or device.type == "cpu" else torch.Stream(device)

    def layers(self, count: int) -> range:
        """Which of `count` layers this stage has; the first stages may have one more. OctavoError if some would have none."""
        if count < self.count:
            raise OctavoError(
                f"--pipeline-parallel-size {self.count} splits the model's {count} layers, and each stage needs one; use "
                f"{count} at most."
            )
        each, more = divmod(count, self.count)
        start, stop = (number * each + min(number, more) for number in (self.number, self.number + 1))
        return range(start, stop)

    def send(self, tensors: Sequence[Tensor], rank: int, stage: int) -> None:
        """Sends to rank `rank` of a stage, and does not wait until they have arrived, except for those of steps before."""
        header = [len(tensors)]
        for x in tensors:
            on_device = int(x.device.type != "cpu")
            header += [_DTYPES.index(x.dtype), on_device, x.dim(), *x.shape, *[0] * (_MOST_DIMS - x.dim())]
        header += [0] * (_HEADER - len(header))
        _forget_arrived()
        for x in (torch.tensor(header), *tensors):
            if x.numel():
                self._send(x.contiguous(), stage * self.split + rank, None if x.device.type == "cpu" else self.lines.onward)

    def _send(self, x: Tensor, to: int, group: torch.distributed.ProcessGroup | None) -> None:
        work = torch.distributed.isend(x, to, group)
        assert work is not None
        (_of_hosts if x.device == CPU else _of_devices).append((x, work))

    def receive(self, rank: int, stage: int) -> list[Tensor]:
        """Waits for the next message of rank `rank` of a stage."""
        source = stage * self.split + rank
        header = torch.empty(_HEADER, dtype=torch.int64)
        torch.distributed.recv(header, source)
        count, *rest = header.tolist()
        found = []
        for at in range(0, count * _EACH, _EACH):
            dtype, on_device, dims, *shape = rest[at : at + _EACH]
            found.append(torch.empty(shape[:dims], dtype=_DTYPES[dtype], device=self.device if on_device else CPU))
            if found[-1].numel():
                torch.distributed.recv(found[-1], source, self.lines.before if on_device else None)
        return found

    def send_numbers(self, numbers: Tensor, rank: int, stage: int) -> None:
        """Sends int64 [n] of the host to rank `rank` of a stage, which knows n, so that no header is needed."""
        _forget_arrived()
        if numbers.numel():
            self._send(numbers, stage * self.split + rank, None)

    def receive_numbers(self, count: int, rank: int, stage: int) -> Tensor:
        """Waits for what rank `rank` of a stage sends with send_numbers: int64 [count]."""
        numbers = torch.empty(count, dtype=torch.int64)
        if count:
            torch.distributed.recv(numbers, stage * self.split + rank)
        return numbers

    def send_back(self, tokens: Tensor, rank: int, sampled: torch.Event | None) -> None:
        """Sends tokens int64 [n], of `device`, from the last stage to rank `rank` of the first.

        sampled: when they are there; they do not wait for what this rank has launched since.
        """
        if self._beside is None:
            self._send(tokens, rank, self.lines.back)
            return
        assert sampled is not None
        self._beside.wait_event(sampled)
        with self._beside:
            self._send(tokens, rank, self.lines.back)

    def receive_back(self, count: int, rank: int) -> Tensor:
        """The first stage's: `count` tokens that rank `rank` of the last stage sends back, int64, of `device`."""
        tokens = torch.empty(count, dtype=torch.int64, device=self.device)
        torch.distributed.recv(tokens, (self.count - 1) * self.split + rank, self.lines.back)
        return tokens
