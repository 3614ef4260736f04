"""The words of a command line before argparse reads them: other spellings of flags, and the flags of a --config file."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from octavo.errors import OctavoError
from octavo.files import read_text

__all__ = ["with_config_file", "with_dashes", "words_of_flags"]

_DOTTED = re.compile(r"(--?[A-Za-z][\w-]*)\.([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """--max_model_len means --max-model-len, and --hf-overrides.rope_theta 1e6 means --hf-overrides '{"rope_theta": 1e6}'."""
    dashed = [re.sub(r"^--[\w-]+", lambda match: match[0].replace("_", "-"), argument) for argument in arguments]
    plain, objects, waiting = [], dict[str, dict[str, Any]](), iter(dashed)
    for word in waiting:
        if (match := _DOTTED.fullmatch(word)) is None:
            plain.append(word)
            continue
        flag, path, value = match.groups()
        _put(flag, objects.setdefault(flag, {}), path.split("."), next(waiting, "") if value is None else value)
    for flag in objects:
        if any(word.partition("=")[0] == flag for word in plain):
            raise OctavoError(f"{flag} is given whole and by {flag}.{next(iter(objects[flag]))}; give one of them.")
    return plain + [word for flag, found in objects.items() for word in (flag, json.dumps(found))]


def _put(flag: str, found: dict[str, Any], path: list[str], text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for key in path[:-1]:
        found = found.setdefault(key, {})
        if not isinstance(found, dict):
            raise OctavoError(f"{flag}.{'.'.join(path)}: {key} is given a value of its own, too; give one of them.")
    found[path[-1]] = value


class _WrongWords(Exception):
    """What argparse says of them."""


def with_config_file(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """The words, and behind them those of the file that --config names, but for flags that the words have already.

    The file is YAML, a flag a key without its dashes. Raises OctavoError that names file and key.
    """
    path, rest = _config_of(arguments)
    if path is None:
        return arguments
    actions = parser._option_string_actions
    given = {actions[flag] for word in rest if (flag := word.partition("=")[0]) in actions}
    if parser.parse_known_intermixed_args(rest)[0].target is not None:
        given.add(actions["--model"])
    return rest + words_of_flags(parser, _read(path), f"--config {path}", given)


def words_of_flags(
    parser: argparse.ArgumentParser, flags: Mapping[Any, Any], source: str, given: Collection[argparse.Action] = ()
) -> list[str]:
    """The words of flags without their dashes -> their values, but for those `given` already. Raises OctavoError that names
    `source` and the flag."""
    actions, words = parser._option_string_actions, list[str]()
    for key, value in flags.items():
        flag = "--" + str(key).replace("_", "-")
        where = f"{source}: {key}"
        if flag == "--config" or (action := actions.get(flag)) is None or isinstance(action, argparse._HelpAction):
            raise OctavoError(f"{where} is not a flag that it can have; see octavo serve --help.")
        made = _words_of(where, flag, action, value)
        try:
            _, left = _known(parser, made)
            if left:
                raise _WrongWords(f"{left[0]} cannot be a value")
        except _WrongWords as error:
            raise OctavoError(f"{where}: {error}.") from None
        words += [] if action in given else made
    return words


def _config_of(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file that --config names, and the other words."""
    path, rest, waiting = None, [], iter(arguments)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        path = value if equals else next(waiting, "")
        if not path.strip():
            raise OctavoError("--config needs the name of a YAML file.")
    return path, rest


def _read(path: str) -> dict[Any, Any]:
    import yaml

    if (text := read_text(Path(path))) is None:
        raise OctavoError(f"--config {path} cannot be read: there is no such file.")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OctavoError(f"--config {path} is not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(found, dict):
        raise OctavoError(f"--config {path} must hold flags as keys, such as `max-model-len: 8192`.")
    return found


def _words_of(where: str, flag: str, action: argparse.Action, value: Any) -> list[str]:
    if value is None:  # such as a secret that was not filled in; an empty --api-key would lock nothing
        raise OctavoError(f"{where} is empty; give it a value, or leave it out.")
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise OctavoError(f"{where} must be true or false, not {json.dumps(value, default=str)[:80]}.")
        negated = f"--no-{flag[2:]}"
        return [flag] if value else [negated] if negated in action.option_strings else []
    if isinstance(value, bool):
        raise OctavoError(f"{where} needs a value, and {json.dumps(value)} is none.")
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [flag, *map(str, value)]
    return [f"{flag}={value if isinstance(value, str) else json.dumps(value, default=str)}"]


def _known(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What argparse makes of the words, and those that it does not know. Raises _WrongWords in place of ending the process."""

    def fail(message: str) -> NoReturn:
        raise _WrongWords(message)

    parser.error = fail  # type: ignore[method-assign]
    try:
        return parser.parse_known_intermixed_args(words)
    finally:
        del parser.error
