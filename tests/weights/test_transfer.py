"""Bytes on their way to a device: the right ones, in any part, no further ahead than allowed, and nothing left running."""

from __future__ import annotations

import os
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from cases import cases
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import OctavoError
from octavo.weights import DummySource, SafetensorsSource, transfer
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.reading_order import reading_order
from octavo.weights.transfer import ReadAhead, Transfer

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (torch sees none)")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(37, 50).bfloat16(), "b": torch.randn(300), "c": torch.tensor(0.5), "d": torch.randn(2, 30, 40).half(),
        "e": torch.randn(64, 64).to(torch.float8_e4m3fn), "f": torch.randint(-9, 9, (5, 7), dtype=torch.int32),
        "g": torch.ones(0, 4),
    }  # fmt: skip
    save_file({name: tensors[name] for name in "abc"}, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] for name in "defg"}, tmp_path / "model-2.safetensors")
    return tmp_path


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def parts_of(tensor: Tensor) -> list[tuple[int, slice]]:
    found = [(0, slice(0, tensor.shape[0] if tensor.ndim else 1))]
    for dim, n in enumerate(tensor.shape):
        found += [(dim, slice(0, n // 2)), (dim, slice(n // 3, n))]
    return found


@devices
@cases("chunk", [96, 1 << 10, 8 << 20])
def test_every_part_arrives(device: str, chunk: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than buffers, and fewer; rows that chunks cut in two, and rows longer than a chunk."""
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    checkpoint = Checkpoint(directory)
    moved = Transfer(checkpoint, torch.device(device))
    for _ in range(3):  # buffers are used again
        for name, expected in stored(directory).items():
            for dim, part in parts_of(expected):
                found = moved.read(checkpoint.tensors[name], dim, part)
                cut = expected[(slice(None),) * dim + (part,)] if expected.ndim else expected
                assert (found.dtype, found.shape, found.device.type) == (cut.dtype, cut.shape, device)
                assert as_bytes(found) == as_bytes(cut), (name, dim, part)
    assert len(moved._buffers) <= transfer.BUFFERS
    moved.close()


@devices
def test_a_source_reads_to_the_device_that_is_asked_for(device: str, directory: Path) -> None:
    source = SafetensorsSource(directory)
    for name, expected in stored(directory).items():
        for dim, part in parts_of(expected):
            found = source.read(name, expected.shape, dim, part, torch.device(device))
            cut = expected[(slice(None),) * dim + (part,)] if expected.ndim else expected
            assert found.device.type == device
            assert as_bytes(found) == as_bytes(cut)
    source.close()


def test_a_file_that_shrinks_is_one_sentence_and_stops_every_thread(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK", 64)
    checkpoint = Checkpoint(directory)
    moved = Transfer(checkpoint, CPU)
    tensor = checkpoint.tensors["a"]
    os.truncate(directory / tensor.file, tensor.start + 1000)
    with pytest.raises(OctavoError, match=r"model-1\.safetensors became shorter while it was read"):
        moved.read(tensor, 0, slice(0, 37))
    moved.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("octavo-read")]


def test_a_file_that_is_gone_is_said_by_whoever_reads_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by no thread that reads ahead, whose traceback would be beside that sentence."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    source = SafetensorsSource(directory)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    source.expect(sorted(source.names))
    with pytest.raises(OctavoError, match=r"model-1\.safetensors cannot be read: No such file or directory\.$"):
        source.checkpoint.descriptor("model-1.safetensors")
    source.close()
    assert failed == []


def test_an_unknown_dtype_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 4, dtype=torch.uint16)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    with pytest.raises(OctavoError, match="tensor a has dtype U16, which Octavo does not read"):
        source.read("a", [3, 4], 0, slice(0, 3), CPU)


def test_files_and_threads_are_given_back(directory: Path) -> None:
    source = SafetensorsSource(directory)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(2):
        source.expect(sorted(source.names))
        assert source.read("a", [37, 50], 0, slice(0, 37), CPU).shape == (37, 50)
        source.close()
        assert set(os.listdir("/proc/self/fd")) == before
        assert not [t for t in threading.enumerate() if t.name.startswith("octavo-read")]


def test_read_ahead_follows_the_order_and_keeps_its_distance(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: asked.append((fd, at, size)))
    monkeypatch.setattr(transfer, "ADVICE", 500)
    monkeypatch.setattr(transfer, "AHEAD", 4000)
    checkpoint = Checkpoint(directory)
    order = [checkpoint.tensors[name] for name in "dabe"]
    ahead, consumed = ReadAhead(checkpoint, order), 0
    for tensor in order:
        expected = min(4000 + consumed, sum(t.nbytes for t in order))
        deadline = time.monotonic() + 20
        while (total := sum(size for _, _, size in asked)) + 500 <= expected and time.monotonic() < deadline:
            time.sleep(0.001)
        assert expected - 500 < total <= expected
        ahead.consumed(tensor)
        consumed += tensor.nbytes
    ahead._thread.join(20)
    ahead.close()
    wanted = [(checkpoint.descriptor(t.file), at) for t in order for at in range(t.start, t.start + t.nbytes)]
    assert [(fd, byte) for fd, at, size in asked for byte in range(at, at + size)] == wanted


def test_the_order_is_that_of_the_modules() -> None:
    layers = [f"model.layers.{i}" for i in (2, 10)]
    names = ["lm_head.weight", "model.norm.weight", *(f"{p}.{n}.weight" for p in layers for n in ("mlp.up", "attn.q"))]
    paths = ["model.embed_tokens", *(f"{p}.{n}" for p in layers for n in ("attn", "mlp")), ""]
    assert reading_order(paths, names) == [
        "model.layers.2.attn.q.weight", "model.layers.2.mlp.up.weight", "model.layers.10.attn.q.weight",
        "model.layers.10.mlp.up.weight", "lm_head.weight", "model.norm.weight",
    ]  # fmt: skip


@devices
@cases("shape", [(3, 5), (1200, 1000), (1, DummySource.POOL), (2, DummySource.POOL)], ids=str)
def test_dummy_weights_walk_through_the_pool_on_every_device(device: str, shape: tuple[int, int]) -> None:
    source = DummySource()
    pool, count = source._pools["BF16", CPU], shape[0] * shape[1]
    for name in ("model.layers.0.mlp.up_proj.weight", "x"):
        found = source.read(name, shape, 0, slice(0, shape[0]), torch.device(device))
        assert found.device.type == device
        expected = pool.roll(-(zlib.crc32(name.encode()) % len(pool))).repeat(-(-count // len(pool)))[:count].view(shape)
        assert torch.equal(found.cpu(), expected)
