"""The commands, the flags that each takes, and the parser of one. Nothing here imports a command's module."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from octavo.checkpoint_values import settled
from octavo.config import IGNORED, EngineConfig, config_fields, flag_of
from octavo.errors import OctavoError
from octavo.hub.snapshots import snapshot_of

__all__ = [
    "COMMANDS", "Command", "command_of", "engine_config", "make_parser", "nearest", "refuse_empty",
]  # fmt: skip

ENGINE = tuple(field.name for field in config_fields())
WEIGHTS = ("model", "revision", "download_dir", "quantization_ignore", "quantize_lm_head")
LOADING = (*WEIGHTS, "dtype", "device", "load_format", "max_model_len", "gpu_memory_utilization", "cpu_kv_cache_gib")
SCHEME = (
    "quantization", "quantization_config", "decode_activations", "kv_cache_dtype", "kv_cache_rounding",
    "calculate_kv_scales", "tensor_parallel_size", "enable_expert_parallel",
)  # fmt: skip
MEASURED = (
    "decode_activations", "kv_cache_rounding", "calculate_kv_scales", "block_size", "max_num_batched_tokens", "enforce_eager",
    "threads",
)  # fmt: skip
STEPS = ("block_size", "max_num_seqs", "max_num_batched_tokens")
IMAGES = ("limit_mm_per_prompt", "language_model_only", "mm_processor_cache_gb", "mm_encoder_tp_mode")
OF_A_SERVER = (
    "trust_remote_code", "tokenizer", "hf_overrides", "rope_scaling", "rope_theta", "generation_config",
    "override_generation_config", "max_logprobs", "kv_cache_dtype_skip_layers", "data_parallel_size", "limit_mm_per_prompt",
    "allowed_local_media_path", "allowed_media_domains", "nnodes", "node_rank", "master_addr", "master_port",
    "distributed_timeout_seconds", "distributed_executor_backend",
)  # fmt: skip
BENCHED = tuple(name for name in ENGINE if name not in OF_A_SERVER)


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module offers add_arguments(parser) and run(args, config, started) -> exit code.

    engine: the fields of EngineConfig that it uses, which are the ones it takes as flags. model: what MODEL may be; empty where
    it takes none. mode: handed to add_arguments too, where one module has several commands. needs: a module that run() imports
    first of all; main imports it, while Ctrl-C can still end the process between two imports of torch's.
    """

    module: str
    help: str
    example: str
    engine: tuple[str, ...]
    model: str = "checkpoint directory, or a name of the hub, OWNER/NAME (default: the embedded demo model)"
    mode: str | None = None
    needs: str | None = None


def _bench(mode: str, help: str, example: str) -> Command:
    line = f"octavo bench {mode} {example}"
    return Command("octavo.tools.bench.bench", help, line, BENCHED, mode=mode, needs="octavo.engine.core")


COMMANDS = {
    "serve": Command(
        "octavo.server.serve",
        "serve a model over HTTP, with OpenAI's API and Anthropic's",
        "octavo serve ./Llama-3.1-8B-Instruct --quantization ptpc_fp8 --kv-cache-dtype fp8",
        ENGINE,
    ),
    "quantize": Command(
        "octavo.tools.quantize.quantize",
        "write an FP8 checkpoint to keep",
        "octavo quantize ./Llama-3.1-8B-Instruct -o ./Llama-3.1-8B-Instruct-FP8 --verify",
        (*WEIGHTS, "hf_overrides", "device", "threads"),
    ),
    "chat": Command(
        "octavo.tools.chat.terminal",
        "talk to a running server or to a model",
        "octavo chat localhost:8000",
        (*LOADING, *SCHEME, "save_quantized", "calibrate", "enforce_eager", "threads", "seed"),
        "URL of a server (default: http://localhost:8000), a checkpoint directory, or a name of the hub",
    ),
    "plan": Command(
        "octavo.tools.plan.plan",
        "say what fits and how fast it could be, before a weight is read",
        "octavo plan Llama-3.1-405B --accelerator mi300x --num-accelerators 8",
        (*LOADING, *SCHEME, *STEPS, *IMAGES, "pipeline_parallel_size"),
        "checkpoint directory, config.json, name of the hub, or one such as Llama-3.1-405B (default: the embedded demo model)",
    ),
    "compare": Command(
        "octavo.tools.compare.compare",
        "measure what each FP8 scheme and KV cache costs in accuracy",
        "octavo compare ./Llama-3.1-8B-Instruct --auto 0.3%",
        (*LOADING, *MEASURED),
        needs="octavo.tools.compare.search",
    ),
    "bench throughput": _bench("throughput", "measure tokens a second, all requests at once", "./Llama-3.1-8B -q ptpc_fp8"),
    "bench latency": _bench("latency", "measure the waits of each request", "./Llama-3.1-8B --num-requests 1"),
    "bench serve": Command(
        "octavo.tools.bench.bench",
        "measure a running server as its clients see it",
        "octavo bench serve --workload A",
        ("seed",),
        model="",
        mode="serve",
    ),
    "bench profile": _bench("profile", "show where the time of a step goes", "./Llama-3.1-8B --png profile.png"),
}
BENCH = "measure throughput and latency, beside what the machine could do at most"


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, and what follows it; a name that is none is given back alone, with the rest.

    Of `bench` the mode is the word after it; `octavo bench --profile` means `octavo bench profile`.
    """
    name, *rest = words
    modes = {full.partition(" ")[2] for full in COMMANDS if full.startswith(f"{name} ")}
    if not modes:
        return name, rest
    if rest and rest[0] in modes:
        return f"{name} {rest[0]}", rest[1:]
    flag = next((word for word in rest if word.startswith("--") and word[2:] in modes), None)
    return (name, rest) if flag is None else (f"{name} {flag[2:]}", [word for word in rest if word != flag])


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Writes what may follow a flag once, after all of its spellings, and breaks no flag and no name at its hyphens."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = action.metavar if isinstance(action.metavar, str) else self._format_args(action, action.dest.upper())
        values = f"[{values}]" if action.nargs == "?" else values
        return f"{', '.join(action.option_strings)} {values}{' ...' if action.nargs == '+' else ''}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that says of a flag it does not know which was meant, or which command has it."""

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"unrecognized arguments: (--?[\w-]+)", message):
            elsewhere = [flag for field in config_fields() for flag in _spellings(field)]
            if match[1].replace("--no-", "--", 1) in elsewhere:
                message = f"{match[1]} is a flag of octavo serve that this command has no use for"
            else:
                shown = (flag for flag, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS)
                message += nearest(match[1], shown)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser(name: str, add_arguments: Callable[..., None]) -> argparse.ArgumentParser:
    """The parser of one command: its own flags, and those of the engine's that it uses, as EngineConfig declares them."""
    command = COMMANDS[name]
    positional = " [MODEL]" if command.model else ""
    parser = _Parser(
        prog=f"octavo {name}",
        usage=f"octavo {name}{positional} [flags]",
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"example:\n  {command.example}",
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.set_defaults(mode=command.mode)
    if command.model:
        parser.add_argument("target", nargs="?", metavar="MODEL", help=command.model)
    own = [] if command.mode is None else [command.mode]
    if command.engine == ENGINE:  # the engine is what it serves
        _add_engine_flags(parser, command)
        add_arguments(parser, *own)
    else:
        add_arguments(parser, *own)
        _add_engine_flags(parser, command)
    return parser


def _add_engine_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    kinds = typing.get_type_hints(EngineConfig)
    groups: dict[str, Any] = {}
    for field in config_fields():
        if field.name in command.engine and (field.name != "model" or command.model):
            heading = field.metadata["group"]
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            groups[heading].add_argument(*_spellings(field), dest=field.name, default=None, **_shape(kinds[field.name], field))


def _spellings(field: Any) -> list[str]:
    return [flag for flag in (field.metadata.get("short"), flag_of(field.name)) if flag]


def _shape(kind: Any, field: Any) -> dict[str, Any]:
    """How argparse should read a field of this type, and what it should say of it."""
    has_default = field.default not in (None, (), "", False)
    default = f" (default: {'on' if field.default is True else field.default})" if has_default else ""
    shape: dict[str, Any] = {"help": (field.metadata["help"] + default).replace("%", "%%")}
    if field.metadata["group"] == IGNORED:  # the command lists them beside its own of that kind
        shape["help"] = argparse.SUPPRESS
    if isinstance(kind, types.UnionType):  # `int | None`: the None is "not given"
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        return {**shape, "action": argparse.BooleanOptionalAction}
    if values := field.metadata.get("values"):  # other spellings are taken too, so these are no choices of argparse's
        return {**shape, "metavar": f"{{{','.join(values)}}}"}
    metavar = field.metadata.get("metavar")
    if typing.get_origin(kind) is tuple:
        return {**shape, "nargs": "+", "action": "extend", "metavar": metavar}
    if "alone" in field.metadata:
        shape |= {"nargs": "?", "const": field.metadata["alone"]}
    read: Callable[[str], Any] = _count if kind is int else kind
    if unset := field.metadata.get("unset"):
        read = _unless(unset, read)
    return {**shape, "type": read, "metavar": metavar or {int: "N", float: "X", str: "NAME"}[kind]}


def _unless(unset: Sequence[str], read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, but None, as where the flag is left out, for spellings that mean it."""

    def value(text: str) -> Any:
        return None if text.lower() in unset else read(text)

    value.__name__ = read.__name__  # argparse names it where the text is wrong
    return value


def _count(text: str) -> int:
    """An integer; 32k is 32,000 and 32K is 32,768, as the peers read them."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG])", text):
        power = "kmg".index(match[2].lower()) + 1
        return int(float(match[1]) * (1000 if match[2].islower() else 1024) ** power)
    return int(text)


_count.__name__ = "integer"  # argparse says "invalid integer value"


def refuse_empty(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises OctavoError for a flag whose value is empty, as an unset variable of a shell is; it would pass for not given.

    A model's name has its own sentence, and an empty --system says nothing, which is its meaning.
    """
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        if not action.option_strings or action.dest in ("model", "system") or given == action.default:
            continue
        if any(isinstance(value, str) and not value.strip() for value in (given if isinstance(given, list) else [given])):
            rest = "." if action.required else ", or leave it out."
            raise OctavoError(f"{max(action.option_strings, key=len)} is empty; give it a value{rest}")


def engine_config(args: argparse.Namespace, downloads: bool = True) -> EngineConfig:
    """The engine's configuration as the command line gives it. The model may come as a flag or on its own.

    downloads: whether a command may download config.json of a name of the hub, which says what --quantization means there.
    """
    target = getattr(args, "target", None)
    model = getattr(args, "model", None)
    if model is None:
        model = target
    elif target not in (None, model):
        raise OctavoError(f"Two models were given, {target} and --model {model}; give one.")
    if model is not None and not model.strip():  # such as an unset variable of a shell
        raise OctavoError(
            "The model's name is empty; give a checkpoint directory or a name of the hub, or nothing at all for the demo model."
        )
    args.model = model
    given = {f.name: value for f in config_fields() if (value := getattr(args, f.name, None)) is not None}
    if "model" in given:
        given["model"] = snapshot_of(given["model"], getattr(args, "revision", None))
    if "tokenizer" in given:
        given["tokenizer"] = snapshot_of(given["tokenizer"], None)
    given, notes = settled(given, given.get("model", ""), downloads)
    for note in notes:
        print(f"octavo: {note}", file=sys.stderr, flush=True)
    return EngineConfig(**given)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X`, where one of the known words is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}" if near else ""
