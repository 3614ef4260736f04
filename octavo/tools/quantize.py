"""`octavo quantize`: a checkpoint in, an FP8 checkpoint out, a few megabytes at a time.

Every file of the checkpoint becomes one of the output. Threads take its matrices in turn; each reads some rows, quantizes them
in its own buffers and writes them to their place, so that reading, arithmetic and writing overlap and memory stays the same
whatever the model. A finished file gets its name, config.json comes last: what has one is whole.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.config import QUANTIZATIONS, EngineConfig, canonical
from octavo.errors import OctavoError
from octavo.models import MODEL_TYPES, read_config
from octavo.platform import Platform, detect
from octavo.quant import SCHEMES, QTensor, QuantRules, dequantize
from octavo.quant.checks import check_format
from octavo.quant.formats import read_weight
from octavo.quant.qtensor import scale_of
from octavo.quant.scheme import BLOCK, Granularity
from octavo.quant.streaming import encode, peaks, search_errors, searched_scale
from octavo.tools.checkpoint_writer import Checkpoint, OutputFile, RowReader, Rows, Scratch
from octavo.tools.output_directory import OutputDirectory
from octavo.tools.quantize_plan import Piece, Plan
from octavo.tools.quantize_report import Progress, verify

__all__ = ["add_arguments", "quantize_checkpoint", "run"]

COPY_CHUNK = 1 << 22  # bytes
COPY_PART = 1 << 26  # bytes of one tensor that one thread copies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command; of the engine's it takes --quantization-ignore, --quantize-lm-head, --device and --threads."""
    group = parser.add_argument_group("quantize")
    group.add_argument("-o", "--output", required=True, metavar="DIR", help="new directory for the FP8 checkpoint")
    group.add_argument(
        "--scheme", metavar="NAME",
        help="ptpc_fp8 (a scale for each output channel), fp8 (one for each matrix) or fp8_block (128x128 tiles) (ptpc_fp8)",
    )  # fmt: skip
    group.add_argument(
        "--scale-search", choices=["mse"], help="try 16 scales from absmax's to twice that and keep the one of least error"
    )
    group.add_argument("--verify", action="store_true", help="read the result back and print the error of each layer")


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Quantizes, or continues where an earlier run of the same command was stopped."""
    asked = args.scheme or config.quantization or "ptpc_fp8"
    scheme = SCHEMES[canonical("--scheme", asked, QUANTIZATIONS)]
    if config.quantization not in (None, scheme.name):
        raise OctavoError(f"--quantization {config.quantization} contradicts --scheme {asked}; give one of them.")
    if not scheme.quantized:
        raise OctavoError(f"--scheme {asked} quantizes nothing; use ptpc_fp8, fp8 or fp8_block.")
    rules = QuantRules(scheme, config.quantization_ignore, config.quantize_lm_head)
    threads = config.threads or len(os.sched_getaffinity(0))
    quantize_checkpoint(
        Path(config.model), Path(args.output), rules,
        search=bool(args.scale_search), device=config.device, threads=threads, check=args.verify,
    )  # fmt: skip
    return 0


def quantize_checkpoint(
    model: Path,
    output: Path,
    rules: QuantRules,
    *,
    search: bool = False,
    device: str = "cpu",
    threads: int = 2,
    check: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes to `output` the checkpoint at `model`, its linear layers in the rules' scheme. Raises OctavoError."""
    config = read_config(model)
    check_format(config, model)
    platform = replace(detect(device), fp8_dtype=torch.float8_e4m3fn)  # the dtype that checkpoints have, whatever the device's
    checkpoint = Checkpoint(model)
    try:
        plan = Plan(checkpoint, RowReader(checkpoint, platform, Scratch()), config, rules)
        if config.get("model_type") not in MODEL_TYPES:
            say(f"note: Octavo does not serve model_type '{config.get('model_type')}'; linear layers are known by their names")
        for line in plan.notes():
            say(line)
        files = {name: OutputFile(output / name, (out for piece in pieces for out in piece.outputs()))
                 for name, pieces in plan.files.items()}  # fmt: skip
        with OutputDirectory(output, checkpoint, files, _job(rules, search)) as directory:
            _write_files(plan, directory, platform, search, threads)
            directory.finish(config, plan.quantization_config())
        before = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        after = sum(file.nbytes for file in files.values())
        say(f"{output}: {after / 1e9:.2f} GB, {100 * after / before:.1f}% of {before / 1e9:.2f} GB")
        if check:
            verify(plan, output, platform, threads, say)
    finally:
        checkpoint.close()


def _job(rules: QuantRules, search: bool) -> dict[str, Any]:
    """What must be the same for a run to continue another one's work."""
    return {
        "scheme": rules.scheme.name, "ignore": list(rules.ignore), "lm_head": rules.quantize_lm_head, "scale_search": search,
    }  # fmt: skip


def _write_files(plan: Plan, directory: OutputDirectory, platform: Platform, search: bool, threads: int) -> None:
    torch.set_num_threads(1)  # the threads below are the parallelism; torch's own would wait for each other
    names = directory.unfinished()
    total = sum(piece.tensor.nbytes for name in names for piece in plan.files[name])
    stop = threading.Event()
    with Progress(total) as progress, ThreadPoolExecutor(threads) as pool:
        try:
            for name in names:
                file = directory.files[name]
                progress.start(name)
                file.open()
                work = Worker(plan.checkpoint, file, platform, search, progress, stop)
                jobs = [pool.submit(job) for piece in _largest_first(plan.files[name]) for job in work.jobs(piece)]
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
                file.commit()
        except BaseException:  # Ctrl-C too: threads end before the file is taken away
            stop.set()
            pool.shutdown(cancel_futures=True)
            file.discard()
            raise


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
        progress: Progress,
        stop: threading.Event,
    ):
        self.checkpoint, self.file, self.platform, self.search = checkpoint, file, platform, search
        self.progress, self.stop = progress, stop

    def jobs(self, piece: Piece) -> list[Callable[[], None]]:
        """What one thread each can do; together they write the piece."""
        if piece.scheme is not None:
            return [partial(self._matrix, piece)]
        ends = range(0, piece.tensor.nbytes, COPY_PART)
        return [partial(self._copy, piece, start, min(start + COPY_PART, piece.tensor.nbytes)) for start in ends]

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
            self.file.write(piece.tensor.name, at, buffer)
            self._done(buffer.nbytes)

    def _done(self, nbytes: int) -> None:
        self.progress.advance(nbytes)
        if self.stop.is_set():
            raise InterruptedError  # another thread's error is the one that is told

    def _matrix(self, piece: Piece) -> None:
        reader = RowReader(self.checkpoint, self.platform, self.scratch)
        rows = piece.row_parts()
        shared = None
        if piece.scheme is not None and piece.scheme.quantized and not piece.is_kept:
            shared = self._shared_scale(piece, reader, rows)
        for part in rows:
            found = read_weight(reader, piece.module, piece.shape, part)
            if piece.is_kept:
                assert isinstance(found, QTensor)
                self._put_codes(piece, part, found.data, found.scale)
            elif piece.scheme is not None and not piece.scheme.quantized:
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
        peak = torch.stack([self._peaks(piece, self._values(read(part))) for part in rows]).amax(0)
        if not self.search:
            return scale_of(peak, torch.float8_e4m3fn)
        values = (self._values(read(part)) for part in rows)
        errors = torch.stack([self._errors(piece, value, peak) for value in values])
        return searched_scale(peak, errors.sum(0))

    def _peaks(self, piece: Piece, values: Tensor) -> Tensor:
        found = peaks(values, piece.granularity)
        if not bool(torch.isfinite(found).all()):
            raise OctavoError(f"{piece.tensor.name} in {piece.tensor.file} holds NaN or infinity; download it again.")
        return found

    def _errors(self, piece: Piece, values: Tensor, peak: Tensor) -> Tensor:
        return search_errors(values, peak, piece.granularity, (self._take("rounded", values), self._take("offset", values)))

    def _quantize(self, piece: Piece, part: Rows, values: Tensor, scale: Tensor | None) -> None:
        if scale is None:
            peak = self._peaks(piece, values)
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
