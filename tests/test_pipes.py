"""Messages whose large buffers go by shared memory: what arrives, what the pipe carries, and what is left."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from octavo import pipes

LARGE = 8 << 20  # bytes, many times what a pipe holds


def mappings(pid: int | str = "self") -> int:
    return Path(f"/proc/{pid}/maps").read_text().count(pipes.NAME)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_large_buffers_pass_the_pipe_by() -> None:
    """Nobody reads while two readers' messages are sent; each gets pages of its own to write to, and no descriptor."""
    (first, one), (second, other) = multiprocessing.Pipe(), multiprocessing.Pipe()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, LARGE, np.uint8).reshape(-1, 2, 4, 128)
    value = (
        "add",
        {"pixels": pixels, "odd": pixels[:1001, 0, 0, 0].repeat(101), "strided": pixels[:40:2], "few": np.arange(5.0)},
    )
    before = descriptors()
    for text in ("a", "b"):
        pipes.send([one, other], (text, *value))
    found = [pipes.receive(reader) for reader in (first, second, first, second)]
    assert descriptors() == before
    assert mappings() == 4
    for text, (got, kind, arrays) in zip("aabb", found, strict=True):
        assert (got, kind) == (text, "add")
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, value[1][name], name)
            assert array.flags.writeable
    kept = found[0][2]["odd"]
    found[0][2]["pixels"][:] = 0
    np.testing.assert_array_equal(found[1][2]["pixels"], pixels)
    del found, arrays, array
    gc.collect()
    assert mappings() == 1, "as long as anything refers to it"
    np.testing.assert_array_equal(kept, value[1]["odd"])
    del kept
    assert mappings() == 0


def test_without_such_memory_the_pipe_carries_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> int:
        raise OSError("none is left")

    monkeypatch.setattr(os, "memfd_create", refused)
    reader, writer = multiprocessing.Pipe()
    pipes.send([writer], np.ones(pipes.SMALL, np.uint8))
    assert pipes.receive(reader).sum() == pipes.SMALL
    writer.close()
    with pytest.raises(EOFError):
        pipes.receive(reader)


def test_messages_are_taken_as_they_come_whole() -> None:
    """In pieces of any size, several at once, and with the long header that multiprocessing gives to 2 GiB."""
    reader, writer = multiprocessing.Pipe()
    incoming, values = pipes.Incoming(reader), [("step", ["a"] * 40, n) for n in range(5)]
    data = b"".join(
        struct.pack("!i", len(one)) + one if n % 2 else struct.pack("!iQ", -1, len(one)) + one
        for n, one in enumerate(map(pickle.dumps, values))
    )
    for size in (1, 7, 60, len(data)):
        found, waits = [], 0
        for start in range(0, len(data), size):
            os.write(writer.fileno(), data[start : start + size])
            taken = incoming.take()
            found += taken
            waits += not taken
        assert found == values
        assert (waits > 0) == (size < len(data))
    writer.send(values)
    assert incoming.take() == [values]
    os.write(writer.fileno(), data[:20])
    writer.close()
    assert incoming.take() == []
    with pytest.raises(EOFError):
        incoming.take()
