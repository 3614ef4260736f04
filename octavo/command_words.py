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
from octavo.flags import nearest

__all__ = ["with_config_file", "with_dashes", "words_of_flags"]

_INTEGER, _NUMBER = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
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
    words, seen = list[str](), dict[argparse.Action, Any]()
    known = {
        name.removeprefix("--"): action
        for name, action in parser._option_string_actions.items()
        if name != "--config" and not isinstance(action, argparse._HelpAction)
    }
    for key, value in flags.items():
        where, name = f"{source}: {key}", str(key).replace("_", "-")
        flag = f"--{name}"
        if (action := known.get(name)) is None:
            near = nearest(name, (name for name, action in known.items() if action.help != argparse.SUPPRESS))
            raise OctavoError(f"{where} is not a flag that it can have{near} (see octavo serve --help).")
        if action in seen:
            raise OctavoError(f"{where} is the same flag as {seen[action]}; give one of them.")
        seen[action] = key
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
    """A flag -> its value: numbers are the text that stands there, as a command line has them, but within objects, which are
    handed on as JSON."""
    import yaml

    if (text := read_text(Path(path))) is None:
        raise OctavoError(f"--config {path} cannot be read: there is no such file.")
    try:
        loader = _loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise OctavoError(f"--config {path} must hold flags as keys, such as `max-model-len: 8192`.")
        keys = [key.value for key, _ in root.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise OctavoError(f"--config {path}: {twice[0]} is given twice; give it once.")
        for _, value in root.value:
            for scalar in (value, *(value.value if isinstance(value, yaml.SequenceNode) else ())):
                if scalar.tag in (_INTEGER, _NUMBER):
                    scalar.tag = "tag:yaml.org,2002:str"
        return dict(loader.construct_document(root))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OctavoError(f"--config {path} is not valid YAML ({' '.join(str(error).split())}).") from None


def _loader(text: str) -> Any:
    """PyYAML's, with the numbers of YAML 1.2. By itself it reads 1.1, where 1e6 is a text, 0123 is 83 and 1:30 is 90."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's convention)
            first: [(tag, pattern) for tag, pattern in listed if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
            for first, listed in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
    Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    Loader.add_implicit_resolver(_NUMBER, number, list("-+.0123456789"))
    Loader.add_constructor(_INTEGER, lambda loader, node: int(node.value))
    Loader.add_constructor(_NUMBER, lambda loader, node: float(node.value))
    return Loader(text)


def _words_of(where: str, flag: str, action: argparse.Action, value: Any) -> list[str]:
    values = value if isinstance(value, list) and action.nargs in ("+", "*") else [value]
    if None in values:  # such as a secret that was not filled in; an empty --api-key would lock nothing
        raise OctavoError(f"{where} is empty; give it a value, or leave it out.")
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            told = value if isinstance(value, str) else json.dumps(value, default=str)
            raise OctavoError(f"{where} must be true or false, not {told[:80]}.")
        negated = f"--no-{flag[2:]}"
        return [flag] if value else [negated] if negated in action.option_strings else []
    if (flat := next((one for one in values if isinstance(one, bool)), None)) is not None:
        raise OctavoError(f"{where} needs a value, and {json.dumps(flat)} is none.")
    texts = [one if isinstance(one, str) else json.dumps(one, default=str) for one in values]
    return [flag, *texts] if values is value else [f"{flag}={texts[0]}"]


def _known(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What argparse makes of the words, and those that it does not know. Raises _WrongWords in place of ending the process."""

    def fail(message: str) -> NoReturn:
        raise _WrongWords(message)

    parser.error = fail  # type: ignore[method-assign]
    try:
        return parser.parse_known_intermixed_args(words)
    finally:
        del parser.error
