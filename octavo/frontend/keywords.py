"""Sentences of errors in the words of Python: the engine's name flags of the command line, and LLM takes keyword arguments."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from octavo.config import config_fields, flag_of
from octavo.errors import InvalidRequest, OctavoError
from octavo.option_values import CHECKPOINT_FORMATS, DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS, UNREAD_FORMATS, canonical
from octavo.peer_flags import peer_keyword

__all__ = ["in_keywords", "names_keywords", "taken_keywords"]

log = logging.getLogger(__name__)

_NAMES = {flag_of(field.name): field.name for field in config_fields()}
_SWITCHES = {field.name for field in config_fields() if isinstance(field.default, bool)}
_WORDS = {
    "dtype": {*DTYPES},
    "quantization": {*QUANTIZATIONS, *CHECKPOINT_FORMATS, *UNREAD_FORMATS},
    "kv_cache_dtype": {*KV_CACHE_DTYPES},
} | {
    field.name: {*field.metadata["values"]}
    for field in config_fields()
    if "values" in field.metadata and field.name not in ("dtype", "quantization", "kv_cache_dtype")
}
_OF_LOGS = ("disable_log_stats",)
_COMMAND = r"octavo [a-z]+(?: --[a-z-]+)+"  # to be run as it stands
_VALUE = r"'[^']*'|-?\d+(?:\.\d+)?(?!\w)|[a-z]\w*|(?:DIR|FILE|N)\b"
_FLAG = re.compile(rf"{_COMMAND}|(?<![\w-])(--(?:[a-z]+-)*[a-z]+)(?: ({_VALUE}))?")


def in_keywords(sentence: str) -> str:
    """`--kv-cache-dtype fp8` becomes kv_cache_dtype="fp8", `--max-model-len 64` max_model_len=64, a flag alone its name. The
    flags of a command, `octavo quantize --calibrate`, stay."""

    def replaced(match: re.Match[str]) -> str:
        flag, value = match[1] or "", match[2]
        name = _NAMES.get(flag, _NAMES.get(flag.replace("--no-", "--", 1)))
        rest = "" if value is None else f" {value}"
        if name is None:
            return match[0]
        if name in _SWITCHES:
            return f"{name}={flag in _NAMES}{rest}"
        if value is None or (value[0].islower() and value not in _WORDS.get(name, ())):
            return f"{name}{rest}"
        return f'{name}="{value}"' if value[0].islower() else f"{name}={value}"

    return _FLAG.sub(replaced, sentence)


@contextmanager
def names_keywords() -> Iterator[None]:
    """Around what a Python program calls: errors leave it with names of keyword arguments."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(in_keywords(str(error)), error.param) from error
    except OctavoError as error:
        raise type(error)(in_keywords(str(error))) from error


def taken_keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of LLM's options that EngineConfig has. vLLM's others are answered as its flags are: what changes nothing is
    logged.

    Raises OctavoError for what is not served, and for names that neither has.
    """
    taken, ignored = {}, []
    for name, value in options.items():
        if name in _NAMES.values():
            taken[name] = value
        elif name in _OF_LOGS:
            continue  # there are no such logs
        elif (named := peer_keyword(name, value)) is None:
            canonical("LLM's option", name, dict.fromkeys(_NAMES.values(), name))
        elif named:
            ignored.append(name)
    if ignored:
        log.warning("Taken without effect: %s.", ", ".join(ignored))
    return taken
