"""One checkpoint quantized into another, a few megabytes at a time.

Every file of the checkpoint becomes one of the output. Threads take its matrices in turn; each reads some rows, quantizes them
in its own buffers and writes them to their place, so that reading, arithmetic and writing overlap and memory stays the same
whatever the model. A finished file gets its name, config.json comes last: what has one is whole.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo import ops
from octavo.convert.calibration import Stash
from octavo.convert.output_directory import OutputDirectory
from octavo.convert.output_file import OutputFile
from octavo.convert.quantize_plan import Piece, Plan
from octavo.convert.row_quantize import encode, peaks, search_errors, searched_scale
from octavo.platform import Platform
from octavo.quant import QTensor, QuantRules, dequantize
from octavo.quant.formats import read_weight
from octavo.quant.qtensor import scale_of
from octavo.quant.scheme import BLOCK, Granularity, WeightDType
from octavo.weights.checkpoint import Checkpoint, RowReader, Rows, Scratch

__all__ = ["Watcher", "job_of", "output_files", "remaining", "write_files"]

COPY_CHUNK = 1 << 22  # bytes
COPY_PART = 1 << 26  # bytes of one tensor that one thread copies


class Watcher(Protocol):
    """Is told how far the work is."""

    def start(self, name: str) -> None:
        """A new file."""

    def advance(self, nbytes: int) -> None:
        """So much more was read. Any thread calls this."""


def output_files(plan: Plan, output: Path) -> dict[str, OutputFile]:
    """The files that `plan` makes, by name; none is opened yet."""
    return {name: OutputFile(output / name, (out for piece in pieces for out in piece.outputs()))
            for name, pieces in plan.files.items()}  # fmt: skip


STATES = 4  # of what a stopped calibration leaves to be continued: a number for each form that it has had


def job_of(
    rules: QuantRules,
    search: bool,
    requantize_int4: bool = False,
    windows: Sequence[Sequence[int]] = (),
    kv_cache_scheme: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What must be the same for a run to continue another one's work. `windows`: token ids to calibrate by, if any.
    `overrides`: what the calibrated model has in place of config.json's values."""
    text = hashlib.sha256(json.dumps([list(w) for w in windows]).encode()).hexdigest()
    by_text = {"calibration": text, "states": STATES, "kv_cache_scheme": kv_cache_scheme}
    by_text |= {"hf_overrides": json.dumps(overrides, sort_keys=True, default=str)} if overrides else {}
    return (by_text if windows else {}) | {
        "scheme": rules.scheme.name + (" of INT4, too" if requantize_int4 else ""), "ignore": list(rules.ignore),
        "lm_head": rules.quantize_lm_head, "scale_search": search,
    }  # fmt: skip


def remaining(plan: Plan, directory: OutputDirectory) -> int:
    """Bytes that are still to be read."""
    return sum(piece.tensor.nbytes for name in directory.unfinished() for piece in plan.files[name])


def write_files(
    plan: Plan,
    directory: OutputDirectory,
    platform: Platform,
    search: bool,
    threads: int,
    progress: Watcher,
    stash: Stash | None = None,
) -> None:
    """Write the files that are not there yet. `stash`: where codes are that calibration has made."""
    if search:
        ops.bind(platform)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads below are the parallelism; torch's own would wait for each other
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name in directory.unfinished():
                file = directory.files[name]
                progress.start(name)
                file.open()
                work = Worker(plan.checkpoint, file, platform, search, progress, stop, stash)
                jobs = [pool.submit(job) for piece in _largest_first(plan.files[name]) for job in work.jobs(piece)]
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
                file.commit()
        except BaseException:  # Ctrl-C too: threads end before the file is taken away
            stop.set()
            pool.shutdown(cancel_futures=True)
            file.discard()
            raise
        finally:
            torch.set_num_threads(before)


def _largest_first(pieces: list[Piece]) -> list[Piece]:
    """So that no thread is left with a large matrix at the end."""
    return sorted(pieces, key=lambda piece: -piece.tensor.nbytes)


class Worker:
    """Fills the tensors of one output file, on any number of threads."""

    _local = threading.local()  # buffers outlive the files

    def __init__(
        self,
        checkpoint: Checkpoint,
        file: OutputFile,
        platform: Platform,
        search: bool,
        progress: Watcher,
        stop: threading.Event,
        stash: Stash | None = None,
    ):
        self.checkpoint, self.file, self.platform, self.search = checkpoint, file, platform, search
        self.progress, self.stop, self.stash = progress, stop, stash

    def jobs(self, piece: Piece) -> list[Callable[[], None]]:
        """What one thread each can do; together they write the piece."""
        if piece.scheme is not None:
            return [partial(self._matrix, piece)]
        if piece.is_measured:
            return [partial(self._measured, piece)]
        ends = range(0, piece.tensor.nbytes, COPY_PART)
        return [partial(self._copy, piece, start, min(start + COPY_PART, piece.tensor.nbytes)) for start in ends]

    def _measured(self, piece: Piece) -> None:
        assert self.stash is not None
        self._put(piece.tensor.name, 0, self.stash.cache_scale(piece.tensor.name))
        self._done(piece.tensor.nbytes)

    @property
    def scratch(self) -> Scratch:
        """This thread's buffers."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        found: Scratch = self._local.scratch
        return found

    def _copy(self, piece: Piece, start: int, stop: int) -> None:
        for at in range(start, stop, COPY_CHUNK):
            buffer = self.scratch.take("copy", (min(COPY_CHUNK, stop - at),), torch.uint8)
            self.checkpoint.read_into(piece.tensor, at, buffer)
            values = buffer.view(piece.tensor.torch_dtype)
            self.checkpoint.finite.look(piece.tensor.name, piece.tensor.file, values)
            self.file.write(piece.tensor.name, at, buffer)
            self._done(buffer.nbytes)

    def _done(self, nbytes: int) -> None:
        self.progress.advance(nbytes)
        if self.stop.is_set():
            raise InterruptedError  # another thread's error is the one that is told

    def _matrix(self, piece: Piece) -> None:
        reader = RowReader(self.checkpoint, self.platform, self.scratch)
        rows = piece.row_parts()
        if self.stash is not None and not piece.is_kept and (made := self.stash.get(piece.module)) is not None:
            self._put_codes(piece, Rows(start=0, stop=piece.shape[0]), *made)
            self._done(piece.tensor.nbytes)
            return
        shared = None
        if piece.scheme is not None and piece.scheme.dtype is WeightDType.FP8 and not piece.is_kept:
            shared = self._shared_scale(piece, reader, rows)
        for part in rows:
            found = read_weight(reader, piece.module, piece.shape, part)
            if piece.is_kept:
                assert isinstance(found, QTensor)
                self._put_codes(piece, part, found.data, found.scale)
            elif piece.scheme is not None and piece.scheme.dtype is WeightDType.BF16:
                dense = found if isinstance(found, Tensor) else dequantize(found)
                self._put(f"{piece.module}.weight", part.start * piece.shape[1] * 2, dense.bfloat16())
            else:
                self._quantize(piece, part, self._values(found), shared)
            self._done(piece.tensor.nbytes * (part.stop - part.start) // piece.shape[0])

    def _values(self, found: QTensor | Tensor) -> Tensor:
        """FP32, in this thread's buffer."""
        dense = found if isinstance(found, Tensor) else dequantize(found)
        return self._take("values", dense).copy_(dense)

    def _take(self, name: str, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.platform.is_cpu:
            return self.scratch.take(name, like.shape, dtype)
        return torch.empty(like.shape, dtype=dtype, device=like.device)

    def _shared_scale(self, piece: Piece, reader: RowReader, rows: list[Rows]) -> Tensor | None:
        """The one scale of all rows, where the scheme has one: the matrix is read once more for it."""
        if piece.granularity is not Granularity.TENSOR:
            return None
        read = partial(read_weight, reader, piece.module, piece.shape)
        peak = torch.stack([peaks(self._values(read(part)), piece.granularity) for part in rows]).amax(0)
        if not self.search:
            return scale_of(peak, torch.float8_e4m3fn)
        values = (self._values(read(part)) for part in rows)
        errors = torch.stack([self._errors(piece, value, peak) for value in values])
        return searched_scale(peak, errors.sum(0))

    def _errors(self, piece: Piece, values: Tensor, peak: Tensor) -> Tensor:
        return search_errors(values, peak, piece.granularity)

    def _quantize(self, piece: Piece, part: Rows, values: Tensor, scale: Tensor | None) -> None:
        if scale is None:
            peak = peaks(values, piece.granularity)
            if self.search:
                scale = searched_scale(peak, self._errors(piece, values, peak))
            else:
                scale = scale_of(peak, torch.float8_e4m3fn)
        codes = self._take("codes", values, torch.float8_e4m3fn)
        encode(values, scale, piece.granularity, codes)
        self._put_codes(piece, part, codes, scale)

    def _put_codes(self, piece: Piece, part: Rows, codes: Tensor, scale: Tensor | None) -> None:
        assert scale is not None
        self._put(f"{piece.module}.weight", part.start * piece.shape[1], codes)
        granularity = piece.granularity
        if granularity is Granularity.TENSOR:
            self._put(f"{piece.module}.weight_scale", 0, scale[:1])
        else:
            row = part.start // BLOCK if granularity is Granularity.BLOCK else part.start
            self._put(f"{piece.module}.weight_scale", row * scale.shape[1] * 4, scale)

    def _put(self, name: str, start: int, data: Tensor) -> None:
        self.file.write(name, start, data.cpu().contiguous())
