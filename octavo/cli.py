"""The command line. Each command's module is imported only when it is called: `octavo --help` must be quick."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from octavo.config import EngineConfig, config_fields, flag_of
from octavo.errors import OctavoError, shortage
from octavo.files import snapshot_of
from octavo.version import __version__

__all__ = ["COMMANDS", "Command", "engine_config", "main", "make_parser"]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module offers add_arguments(parser) and run(args, config, started) -> exit code."""

    module: str
    help: str
    modes: tuple[str, ...] = ()  # what the word after the command may be, where it takes one


COMMANDS = {
    "serve": Command("octavo.server.serve", "serve a model over HTTP, with OpenAI's API"),
    "quantize": Command("octavo.tools.quantize.quantize", "write an FP8 checkpoint to keep"),
    "chat": Command("octavo.tools.chat.terminal", "talk to a running server or to a model"),
    "plan": Command("octavo.tools.plan.plan", "say what fits and how fast it could be, before a weight is read"),
    "compare": Command("octavo.tools.compare.compare", "measure what each FP8 scheme and KV cache costs in accuracy"),
    "bench": Command(
        "octavo.tools.bench.bench",
        "measure throughput and latency, beside what the machine could do at most",
        modes=("throughput", "latency", "serve", "profile"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What a person can mend is one sentence on stderr and exit code 1; wrong usage is 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "--version", "-V"):
        print(f"octavo {__version__}" if arguments and arguments[0] in ("--version", "-V") else _overview())
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"octavo: '{name}' is not a command{_nearest(name, COMMANDS)} (see octavo --help)", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[name].module)
        # Intermixed, or flags between a mode and MODEL would hide the latter.
        given = _mode_first(_with_dashes(arguments[1:]), COMMANDS[name].modes)
        args = make_parser(name, module.add_arguments).parse_intermixed_args(given)
        return int(module.run(args, engine_config(args), _started()))
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `octavo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        told = shortage(error) or (_of_system(error) if isinstance(error, OSError) else None)
        if told is None:
            raise
        print(f"octavo: {told}", file=sys.stderr)
        return 1


def _of_system(error: OSError) -> str:
    """What the system refused: a name that is too long, a full disk behind standard output."""
    name = f": {error.filename}" if error.filename is not None else ""
    return f"{error.strerror or error}{name[:200]}."


def _mode_first(arguments: list[str], modes: Sequence[str]) -> list[str]:
    """`octavo bench --profile` means `octavo bench profile`."""
    flag = next((argument for argument in arguments if argument.removeprefix("--") in modes and argument not in modes), None)
    return arguments if flag is None else [flag.removeprefix("--"), *(one for one in arguments if one != flag)]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    usage = "usage: octavo COMMAND ...\n       octavo COMMAND --help\n\nServes large language models in FP8.\n\ncommands:\n"
    return usage + "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += _nearest(match[1], self._option_string_actions)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser(name: str, add_arguments: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    """The parser of one command: its own flags, and the engine's as EngineConfig declares them."""
    parser = _Parser(prog=f"octavo {name}", description=COMMANDS[name].help, allow_abbrev=False)
    if modes := COMMANDS[name].modes:
        parser.add_argument("mode", choices=modes, metavar="MODE", help=", ".join(modes))
    parser.add_argument("target", nargs="?", metavar="MODEL", help="checkpoint directory; without one, the embedded demo model")
    add_arguments(parser)
    group = parser.add_argument_group("engine")
    types_of = typing.get_type_hints(EngineConfig)
    for field in config_fields():
        flags = [flag for flag in (field.metadata.get("short"), flag_of(field.name)) if flag]
        group.add_argument(*flags, dest=field.name, default=None, **_shape(types_of[field.name], field))
    return parser


def _shape(kind: Any, field: Any) -> dict[str, Any]:
    """How argparse should read a field of this type."""
    default = "" if field.default in (None, (), "", False) else f" ({'on' if field.default is True else field.default})"
    shape: dict[str, Any] = {"help": (field.metadata["help"] + default).replace("%", "%%")}
    if isinstance(kind, types.UnionType):  # `int | None`: the None is "not given"
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        return {**shape, "action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        return {**shape, "nargs": "+", "action": "extend", "metavar": field.name.split("_")[-1].upper()}
    metavar = {int: "N", float: "X", str: "NAME"}[kind]
    return {**shape, "type": _count if kind is int else kind, "metavar": metavar}


def _count(text: str) -> int:
    """An integer; 32k is 32,000 and 32K is 32,768, as the peers read them."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG])", text):
        power = "kmg".index(match[2].lower()) + 1
        return int(float(match[1]) * (1000 if match[2].islower() else 1024) ** power)
    return int(text)


_count.__name__ = "integer"  # argparse says "invalid integer value"


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's configuration as the command line gives it. The model may come as a flag or on its own."""
    if args.model is None:
        args.model = args.target
    elif args.target not in (None, args.model):
        raise OctavoError(f"Two models were given, {args.target} and --model {args.model}; give one.")
    if args.model is not None and not args.model.strip():  # such as an unset variable of a shell
        raise OctavoError("The model's name is empty; give a checkpoint directory, or nothing at all for the demo model.")
    given = {f.name: value for f in config_fields() if (value := getattr(args, f.name)) is not None}
    if "model" in given:
        given["model"] = snapshot_of(given["model"], args.revision)
    return EngineConfig(**given)


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """--max_model_len means --max-model-len."""
    return [re.sub(r"^--[\w-]+", lambda match: match[0].replace("_", "-"), argument) for argument in arguments]


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}" if near else ""


def _started() -> float:
    """When this process started, by time.time(): imports count towards the time to ready too."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return time.time() - float(uptime.read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # no /proc on this system
        return time.time()


if __name__ == "__main__":
    sys.exit(main())
