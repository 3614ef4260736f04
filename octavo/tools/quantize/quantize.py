"""`octavo quantize`: a checkpoint in, an FP8 checkpoint out, a few megabytes at a time (octavo.convert.quantizer)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from octavo.config import EngineConfig
from octavo.convert.cache_scales import STRATEGIES, scales_to_measure
from octavo.convert.calibration import WINDOW, Stash, calibrate, stash_bytes
from octavo.convert.output_config import quantization_config
from octavo.convert.output_directory import MARKER, OutputDirectory
from octavo.convert.quantize_plan import Plan, names_of
from octavo.convert.quantizer import job_of, output_files, remaining, write_files
from octavo.engine.calibration_text import TOKENS, calibration_windows
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.frontend.model_files import with_files
from octavo.models import MODEL_TYPES, architecture, read_config
from octavo.models.overrides import overridden
from octavo.option_values import QUANTIZATIONS, canonical
from octavo.platform import detect
from octavo.quant import SCHEMES, QuantRules
from octavo.quant.checks import check_format
from octavo.tools.quantize.quantize_report import LossReport, Progress, verify
from octavo.tools.rich_tables import gb
from octavo.weights.checkpoint import Checkpoint, RowReader, Scratch

__all__ = ["add_arguments", "quantize_checkpoint", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("quantize")
    group.add_argument("-o", "--output", required=True, metavar="DIR", help="new directory for the FP8 checkpoint")
    group.add_argument(
        "-q", "--quantization", "--scheme", dest="scheme", action="append", metavar="{ptpc_fp8,fp8,fp8_block,fp8_w8a16}",
        help="a scale for each output channel, for each matrix, or for each tile of 128 x 128; fp8_w8a16 is ptpc_fp8 with "
        "activations as they are (default: ptpc_fp8)",
    )  # fmt: skip
    group.add_argument(
        "--scale-search",
        choices=["mse"],
        help="try 16 scales from absmax's to twice that and keep the one of least error, as --calibrate always does",
    )
    group.add_argument(
        "--requantize-int4",
        action="store_true",
        help="decode packed INT4 and round it to the scheme; it stays as it is without",
    )
    group.add_argument(
        "--calibrate", nargs="?", const="default", dest="by_text", metavar="FILE",
        help="round with error compensation, by what a text makes each layer read: a UTF-8 file, or Octavo's own text, "
        "which is default, or no FILE",
    )  # fmt: skip
    group.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"most tokens of the text to calibrate by, in whole windows of {WINDOW} (default: {TOKENS})",
    )
    group.add_argument(
        "--kv-cache-scheme", choices=STRATEGIES,
        help="say in config.json that the KV cache is FP8 with a scale for each layer or for each KV head, as llm-compressor "
        "does: vLLM and transformers then have such a cache whatever they are told. --calibrate writes the scales of layers "
        "without it, too, for --kv-cache-dtype fp8",
    )  # fmt: skip
    group.add_argument("--verify", action="store_true", help="read the result back and print the error of each layer")


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Quantizes, or continues where an earlier run of the same command was stopped."""
    asked, *more = args.scheme or ["ptpc_fp8"]
    scheme = SCHEMES[canonical("--scheme", asked, QUANTIZATIONS)]
    if other := next((name for name in more if canonical("--scheme", name, QUANTIZATIONS) != scheme.name), None):
        raise OctavoError(f"Two schemes were given, {asked} and {other}; give one of them.")
    if not scheme.quantized:
        raise OctavoError(f"--scheme {asked} quantizes nothing; use ptpc_fp8, fp8, fp8_block or fp8_w8a16.")
    config = with_files(config)
    rules = QuantRules(scheme, config.quantization_ignore, config.quantize_lm_head)
    threads = config.threads or len(os.sched_getaffinity(0))
    if args.by_text is None and args.calibration_tokens is not None:
        raise OctavoError("--calibration-tokens is for --calibrate, which was not given; add it, or leave this out.")
    if args.by_text is None and config.hf_overrides is not None:
        raise OctavoError("--hf-overrides is for --calibrate, which computes the model, and was not given; leave it out.")
    if args.by_text is None and args.kv_cache_scheme is not None:
        raise OctavoError("--kv-cache-scheme is for --calibrate, which measures the scales; add it, or leave this out.")
    tokens = TOKENS if args.calibration_tokens is None else args.calibration_tokens
    windows = () if args.by_text is None else calibration_windows(Path(config.model), args.by_text, tokens)
    if windows and (found := sum(map(len, windows))) < tokens - tokens % len(windows[0]):
        print(f"note: the text has {found:,} tokens in whole windows of {len(windows[0])}, fewer than {tokens:,}")
    output = Path(args.output)
    try:
        quantize_checkpoint(
            Path(config.model), output, rules, search=bool(args.scale_search), device=config.device, threads=threads,
            check=args.verify, requantize_int4=args.requantize_int4, windows=windows, kv_cache_scheme=args.kv_cache_scheme,
            overrides=cast("dict[str, Any] | None", config.hf_overrides),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"octavo: stopped; {_left_in(output)}", file=sys.stderr)
        raise
    return 0


def _left_in(output: Path) -> str:
    """What a run that was stopped leaves, in words."""
    if (output / MARKER).exists():
        return "the same command continues"
    return f"{output} is whole" if (output / "config.json").exists() else f"nothing is left in {output}"


def quantize_checkpoint(
    model: Path,
    output: Path,
    rules: QuantRules,
    *,
    search: bool = False,
    device: str = "cpu",
    threads: int = 2,
    check: bool = False,
    requantize_int4: bool = False,
    windows: Sequence[Sequence[int]] = (),
    kv_cache_scheme: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes to `output` the checkpoint at `model`, its linear layers in the rules' scheme. Raises OctavoError.

    Packed INT4 stays as it is stored but with `requantize_int4`. windows: token ids to calibrate by, if any. Neither they nor
    `search` are taken where every matrix keeps its stored codes. kv_cache_scheme: of STRATEGIES, what config.json says of the
    scales of an FP8 cache, which windows measure; None: nothing. overrides: values in place of config.json's by which the
    model that reads the windows computes; the output's config.json is the model's.
    """
    config = read_config(model)
    check_format(config, model)
    computed: Mapping[str, Any] = config
    if windows:
        architecture(config)  # refuses one that cannot be run
        computed = overridden(config, overrides)
    platform = replace(detect(device), fp8_dtype=torch.float8_e4m3fn)  # the dtype that checkpoints have, whatever the device's
    with closing(Checkpoint(model)) as checkpoint:
        reader = RowReader(checkpoint, platform, Scratch())
        scales = scales_to_measure(checkpoint, computed, kv_cache_scheme) if windows else None
        plan = Plan(checkpoint, reader, config, rules, requantize_int4=requantize_int4, cache_scales=scales)
        if config.get("model_type") not in MODEL_TYPES:
            say(f"note: Octavo does not serve model_type '{config.get('model_type')}'; linear layers are known by their names")
        if windows:
            plan.check_rounds("--calibrate", by_text=True)
        elif search:
            plan.check_rounds("--scale-search mse", by_text=False)
        for line in plan.notes():
            say(line)
        files = output_files(plan, output)
        job = job_of(rules, search, requantize_int4, windows, kv_cache_scheme, overrides)
        directory = OutputDirectory(output, checkpoint, files, job, beside=stash_bytes(plan, computed, windows))
        if output.is_dir() and directory.is_complete():
            say(f"{output} is finished already: made of {model} with these settings")
        else:
            with directory:
                stash = Stash(directory.stash) if windows else None
                if stash is not None and scales is not None:
                    calibrate(plan, computed, windows, detect(device), stash, threads, LossReport(say))
                    if left := [p.module for p in plan.quantized if not p.is_kept and stash.get(p.module) is None]:
                        say(f"{len(left)} matrices are rounded plainly, as no text reads them: {names_of(left)}")
                    say(stash.said_of(plan, windows))
                    say(stash.said_of_scales(scales))
                with Progress(remaining(plan, directory)) as progress:
                    write_files(plan, directory, platform, search, threads, progress, stash)
                if stash is not None:
                    stash.write_key_rounding(output / KEY_ROUNDING)
                directory.finish(config, quantization_config(plan))
        before = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        after = sum(file.nbytes for file in files.values())
        say(f"{output}: {gb(after)}, {100 * after / before:.1f}% of {gb(before)}")
        if check:
            verify(plan, output, platform, threads, say)
