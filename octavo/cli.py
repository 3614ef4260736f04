"""The command line. Each command's module is imported only when it is called: `octavo --help` must be quick."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence

from octavo.command_words import with_config_file, with_dashes
from octavo.errors import OctavoError, shortage
from octavo.flags import BENCH, COMMANDS, command_of, engine_config, make_parser, nearest, refuse_empty
from octavo.version import __version__

__all__ = ["engine_config", "main", "make_parser"]


def main(argv: Sequence[str] | None = None, imported: Callable[[], object] = lambda: None) -> int:
    """Runs one command. What a person can mend is one sentence on stderr and exit code 1; wrong usage is 2.

    imported: is called once the command's modules are imported, before it runs.
    """
    _open_standard_streams()
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        if arguments[:1] == ["help"]:
            arguments = ["--help"] if arguments[1:] == ["help"] else [*arguments[1:], "--help"]
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if arguments[0] in ("--version", "-V"):
            print(f"octavo {__version__}")
            return 0
        name, rest = command_of(arguments)
        if name not in COMMANDS:
            return _no_command(name, rest)
        command, given = COMMANDS[name], with_dashes(rest)
        module = importlib.import_module(command.module)
        parser = make_parser(name, module.add_arguments)
        if name == "serve":
            given = with_config_file(parser, given)
        args = parser.parse_intermixed_args(given)  # or flags before MODEL that take several values would hide it
        refuse_empty(parser, args)
        if command.needs is not None:
            importlib.import_module(command.needs)
        imported()
        return int(module.run(args, engine_config(args, downloads=name != "plan"), _started()))
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


def _open_standard_streams() -> None:
    """Opens /dev/null in place of standard streams that are closed.

    Sockets and files that are opened later would take their numbers, and libraries which write to standard error by its number
    would write into them.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (it stays open)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _no_command(name: str, rest: Sequence[str]) -> int:
    """Answers a word that is no command, and a command that needs a mode and has none."""
    modes = [full.partition(" ")[2] for full in COMMANDS if full.startswith(f"{name} ")]
    if modes and rest and rest[0] in ("-h", "--help"):
        print(_overview(name))
        return 0
    if modes:
        word = f"'{rest[0]}' is no mode{nearest(rest[0], modes)}" if rest else "a mode is missing"
        print(f"octavo {name}: {word}; the modes are {', '.join(modes)} (see octavo {name} --help)", file=sys.stderr)
        return 2
    known = {full.partition(" ")[0] for full in COMMANDS}
    print(
        f"octavo: '{name}' is not a command{nearest(name, [*known, 'help', '--version'])} (see octavo --help)", file=sys.stderr
    )
    return 2


def _overview(of: str = "") -> str:
    """The commands, a line each; the modes of the command `of`, where one is given."""
    if of:
        usage, what, heading = (
            f"usage: octavo {of} MODE [flags]\n       octavo {of} MODE --help",
            f"{BENCH.capitalize()}.",
            "modes",
        )
        helps = {name.partition(" ")[2]: command.help for name, command in COMMANDS.items() if name.startswith(f"{of} ")}
        example = f"octavo {of} throughput --quantization ptpc_fp8"
    else:
        usage = "usage: octavo COMMAND [flags]\n       octavo help COMMAND\n       octavo --version"
        what, heading = "Serves large language models in FP8.", "commands"
        helps = {name: command.help for name, command in COMMANDS.items() if " " not in name}
        helps |= {"bench": BENCH, "help": "list the flags of a command: octavo help serve"}
        example = "octavo serve --quantization ptpc_fp8 --kv-cache-dtype fp8"
    lines = "\n".join(f"  {name:10}  {help}" for name, help in helps.items())
    return f"{usage}\n\n{what}\n\n{heading}:\n{lines}\n\nexample, with the embedded demo model:\n  {example}"


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
