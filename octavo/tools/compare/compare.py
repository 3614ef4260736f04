"""`octavo compare`: BF16 against every FP8 scheme and KV cache on a text, a verdict, and what to do about it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig, canonical
from octavo.errors import OctavoError
from octavo.frontend.loading_bar import LoadingBar
from octavo.frontend.model_files import with_files
from octavo.server.console import say
from octavo.tools.json_numbers import json_text

if TYPE_CHECKING:
    from octavo.tools.compare.comparison import Comparison
    from octavo.tools.compare.layer_errors import Sensitivity
    from octavo.tools.compare.measure import Measurement, Variant
    from octavo.tools.compare.search import Budget

__all__ = ["add_arguments", "compare", "run", "write_atomically", "write_config"]

TOKENS, WINDOW = 8192, 512  # tells half a percent of perplexity on the models that it was tried with
DEFAULT_FILE = "quantization_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command; the engine's say how the model is run (--quantization-ignore holds for every scheme)."""
    group = parser.add_argument_group("compare")
    group.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to measure on (default: the demo's held-out text)")
    group.add_argument(
        "--tokens", metavar="N", type=int, default=TOKENS, help="tokens of it, evenly spread; 0: all (default: %(default)s)"
    )
    group.add_argument(
        "--window", metavar="N", type=int, default=WINDOW, help="tokens that are read in one go (default: %(default)s)"
    )
    known = "{fp8,ptpc_fp8,fp8_block,fp8_w8a16,bf16}"
    group.add_argument("--scheme", metavar=known, nargs="+", help="schemes to compare (default: all)")
    calibrated = "what octavo quantize --calibrate made of the model, in one of the schemes: measured beside plain rounding"
    group.add_argument("--calibrated", metavar="DIR", type=Path, help=calibrated)
    group.add_argument(
        "--kv",
        metavar="{auto,fp8,fp8_e5m2,fp8_per_token_head}",
        nargs="+",
        help="KV cache dtypes to compare; MLA has auto and fp8 (default: all)",
    )
    group.add_argument("--output", metavar="FILE", type=Path, help="write a report with plots, one HTML file")
    help_auto = "find the first configuration within BUDGET: a rise in perplexity (0.3%%) or a KL in nats a token (0.002)"
    group.add_argument("--auto", metavar="BUDGET", help=help_auto)
    save = f"where --auto writes what `octavo serve --quantization-config` takes (default: {DEFAULT_FILE})"
    group.add_argument("--save", metavar="FILE", type=Path, help=save)
    group.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Compares, prints, writes. Exit code 1 where --auto found nothing within the budget."""
    from octavo.tools.compare import loss_table
    from octavo.tools.compare.caches import kv_names
    from octavo.tools.compare.search import SCHEME_NAMES, Budget

    budget = Budget.parse(args.auto) if args.auto else None
    if args.save and not budget:
        raise OctavoError("--save names the file that --auto writes; give a budget too, such as --auto 0.3%.")
    save = (args.save or Path(DEFAULT_FILE)) if budget else None
    if budget and args.calibrated:
        raise OctavoError("--auto looks for flags that serve MODEL, and --calibrated is another checkpoint; give one of them.")
    for path in filter(None, (args.output, save)):  # a wrong path must not cost the measurement
        _check_writable(path)
    if args.output:
        from octavo.tools.compare import html_report

        html_report.check()
    for flag, value, least in (("--tokens", args.tokens, 0), ("--window", args.window, 2)):
        if value < least:
            raise OctavoError(f"{flag} must be at least {least}, not {value}.")
    schemes = _canonical("--scheme", args.scheme or ["bf16", *SCHEME_NAMES], QUANTIZATIONS, SCHEME_NAMES)
    model, config = config.model, with_files(config)
    kvs = kv_names(config, [canonical("--kv", name, KV_CACHE_DTYPES) for name in args.kv or []])
    name, ids = _read(config, args.text)
    with closing(LoadingBar()) as bar:
        how: dict[str, Any] = {"window": args.window, "tokens": args.tokens or None, "tell": bar.update, "say": say}
        how["calibrated"] = args.calibrated
        found = compare(config, ids, schemes, kvs, budget, **how)
    found.model = model  # as it was given
    found.text, found.command = name, shlex.join(["octavo", *sys.argv[1:]])
    found.date = datetime.now().astimezone().isoformat(" ", "minutes")
    if save and found.chosen:
        write_config(save, found, config)
        found.saved = str(save)
    if args.output:
        write_atomically(args.output, html_report.render(found))
    if args.json:
        print(json_text(found.as_json()))
    else:
        loss_table.show(found, args.output)
    return 0 if found.chosen or not budget else 1


def compare(
    config: EngineConfig,
    ids: Sequence[int],
    schemes: Sequence[str],
    kvs: Sequence[str],
    budget: Budget | None = None,
    *,
    window: int = WINDOW,
    tokens: int | None = TOKENS,
    calibrated: Path | None = None,
    tell: Callable[[str, float], None] = lambda stage, done: None,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measures every scheme with every KV dtype on the token ids `ids`; with a budget, only what the search for it needs.

    schemes, kvs: canonical names. calibrated: a checkpoint of the same model with calibrated codes, in one of them. tell:
    learns what is being done, and how much of everything is. say: gets a line for each variant that was measured. Raises
    OctavoError for what the engine refuses.
    """
    from octavo.quant import WeightDType
    from octavo.tools.compare import search
    from octavo.tools.compare.caches import stored_as
    from octavo.tools.compare.calibrated import served_schemes
    from octavo.tools.compare.comparison import Comparison
    from octavo.tools.compare.layer_errors import layer_errors, sensitivities, worth_keeping
    from octavo.tools.compare.measure import REFERENCE, Reference, Variant, cut, measure, open_core, score

    if set(schemes) == {"bf16"} and set(kvs) == {"auto"}:
        raise OctavoError("bf16 with a BF16 KV cache is what everything is compared with; name another --scheme or --kv.")
    decodes = config.decode_activations != "auto"
    config = replace(config, language_model_only=True, decode_activations="auto")  # a text never reaches a vision tower
    context = _context(config)
    text = cut(ids, window, tokens, context, decoded=decodes)
    quantized = [scheme for scheme in schemes if scheme != "bf16"]
    codes = served_schemes(calibrated, quantized, config) if calibrated else []
    variants = [
        Variant(scheme, kv, (), made, decode)
        for scheme in schemes
        for kv in kvs
        for made in _made(scheme, codes, calibrated)
        for decode in search.decodings(scheme, decodes)
    ]
    total = len(variants) - ("bf16" in schemes and "auto" in kvs) + bool(quantized)  # the last keeps some layers
    tell("measuring BF16", 0)
    core = open_core(config, REFERENCE, text)
    reference = Reference.of(core, text)
    first = score(REFERENCE, core.runner, reference.hidden, reference.greedy, text, reference)
    say(f"octavo: BF16: perplexity {first.perplexity:.3f} on {text.predictions:,} predictions")
    tell("measuring the error of each layer", 0)
    errors = layer_errors(core, quantized, text.windows[0])
    sizes = text.predictions, len(text.windows[0]), context, text.greedy
    found = Comparison(config.model, config, *sizes, budget or search.DEFAULT_BUDGET, first, [], errors, decoded=text.decoded)
    if stored_so := {key: group for key, group in core.runner.report.groups.items() if group.dtype is not WeightDType.BF16}:
        kinds = ", ".join(f"{role} in {scheme}" for role, scheme in sorted(stored_so))
        found.notes.append(
            f"{sum(group.tensors for group in stored_so.values())} layers are stored in codes already ({kinds}) and keep them "
            "whatever the scheme: BF16 here means the checkpoint as stored"
        )
    if hasattr(core.runner.model, "has_tower"):
        found.notes.append(
            "the vision tower is not loaded: a text is measured, and every number is the text model's; a scheme holds for the "
            "tower too, unless --quantization-ignore names it"
        )
    if "fp8_e4m3" in kvs and (stored := stored_as(config, "fp8_e4m3")) != "fp8_e4m3":
        found.notes.append(f"a KV cache of fp8_e4m3 is {stored} on this model")
    found.machine = core.runner.platform.name
    del core  # one model in memory at a time
    results, began = {REFERENCE: first}, time.monotonic()

    def measured(variant: Variant) -> Measurement:
        if variant not in results:
            number, name = len(found.measured) + 1, search.name_of(variant)
            place = str(number) if budget else f"{number} of {total}"
            tell(f"measuring {place}: {name}", min(1.0, (number - 1) / total))
            results[variant] = m = measure(config, variant, text, reference)
            found.measured.append(m)
            seconds = (time.monotonic() - began) / number * (total - number)
            left = f", about {seconds:.0f} s left" if not budget and number < total else ""
            loss = f"{100 * m.change:+.2f}% ±{100 * m.change_error:.2f} of perplexity, KL {m.kl:.2g}"
            say(f"octavo: {place}: {name}: {loss}{left}")
        return results[variant]

    def rank(scheme: str) -> list[Sensitivity]:
        stage = f"measuring which layers {scheme} costs most"
        found.scheme, found.ranked = scheme, sensitivities(config, scheme, text, lambda done: tell(stage, done))
        found.kept = worth_keeping(found.ranked)
        return found.ranked

    if budget:
        chosen = search.search(budget, measured, rank, quantized, kvs, decodes)
        over = [m for m in found.measured if not budget.met(m)]
        found.verdict, found.chosen = search.verdict(budget, [*over, chosen] if chosen else over, text.predictions)
        return found
    for variant in variants:
        measured(variant)
    if same := dict.fromkeys(m.variant.scheme for m in found.measured if m.weights_as_stored and m.variant.scheme in quantized):
        found.notes.append(f"--quantization {', '.join(same)} changes nothing: all that it is for is stored in codes already")
    climbed = search.rungs(found.measured)
    found.verdict, found.chosen = search.verdict(found.budget, climbed, text.predictions)
    if found.measured and quantized:
        best = found.chosen
        if best is None or best.variant.scheme == "bf16":
            best = min(map(found.row_of, quantized), key=found.budget.loss)
        rank(best.variant.scheme)
        kept = measured(replace(best.variant, ignore=tuple(found.ignore), calibrated=""))  # codes are no longer values
        if found.chosen is None:
            found.verdict, found.chosen = search.verdict(found.budget, [*climbed, kept], text.predictions)
    return found


def _made(scheme: str, codes: Sequence[str], calibrated: Path | None) -> list[str]:
    """The checkpoints that `scheme` is measured with: the user's own, "", and the calibrated one where it has its codes."""
    return ["", str(calibrated)] if scheme in codes else [""]


def write_config(path: Path, found: Comparison, config: EngineConfig) -> None:
    """What was chosen, as `--quantization-config` reads it, with the measurement that it stands on."""
    assert found.chosen is not None
    engine, m = found.chosen.variant.config(config), found.chosen
    about = {"model": found.model, "text": found.text, "tokens": found.predictions, "budget": str(found.budget)}
    numbers = {"perplexity": m.perplexity, "change": m.change, "kl": m.kl, "top1": m.top1}
    value = {
        "quantization": engine.quantization,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "quantization_ignore": list(engine.quantization_ignore),
        "quantize_lm_head": engine.quantize_lm_head,
        "kv_cache_rounding": engine.kv_cache_rounding,
        "calculate_kv_scales": engine.calculate_kv_scales,
        "decode_activations": engine.decode_activations,
        "measured": {**about, "bf16_perplexity": found.reference.perplexity, **numbers, "decided": found.budget.decided(m)},
    }
    write_atomically(path, json_text(value) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Under a temporary name first: a reader finds the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OctavoError(f"{path} cannot be written: {error.strerror}.") from None


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise OctavoError(f"{path} is a directory; name a file in it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OctavoError(f"{path} cannot be written: there is no writable directory {path.parent}.")


def _canonical(option: str, given: Sequence[str], known: dict[str, str], ladder: Sequence[str]) -> list[str]:
    """The schemes that `given` names, each once, in the order of the ladder; BF16 comes last."""
    names = {canonical(option, name, known) for name in given}
    return sorted(names, key=lambda name: ladder.index(name) if name in ladder else len(ladder))


def _read(config: EngineConfig, path: Path | None) -> tuple[str, list[int]]:
    """The text's name and its tokens."""
    from octavo.demo import HELDOUT
    from octavo.text.tokenizer import Tokenizer

    path = path or HELDOUT
    tokenizer = Tokenizer(config.model)
    try:
        return path.name, tokenizer.encode(path.read_text("utf-8"))
    except OSError as error:
        raise OctavoError(f"--text {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise OctavoError(f"--text {path} is not UTF-8 text.") from None


def _context(config: EngineConfig) -> int:
    from octavo.models import architecture, read_config

    values = read_config(Path(config.model))
    longest: int = architecture(values).Config.from_json(values).max_position_embeddings
    return min(longest, config.max_model_len or longest)
