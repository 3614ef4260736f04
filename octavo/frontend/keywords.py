"""Sentences of errors in the words of Python: the engine's name flags of the command line, and LLM takes keyword arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from octavo.config import CHECKPOINT_FORMATS, KV_CACHE_DTYPES, QUANTIZATIONS, config_fields, flag_of
from octavo.errors import InvalidRequest, OctavoError

__all__ = ["in_keywords", "names_keywords"]

_NAMES = {flag_of(field.name): field.name for field in config_fields()}
_SWITCHES = {field.name for field in config_fields() if isinstance(field.default, bool)}
_WORDS = {"quantization": {*QUANTIZATIONS, *CHECKPOINT_FORMATS}, "kv_cache_dtype": {*KV_CACHE_DTYPES}} | {
    field.name: {*field.metadata["values"]}
    for field in config_fields()
    if "values" in field.metadata and field.name not in ("quantization", "kv_cache_dtype")
}
_FLAG = re.compile(r"(?<![\w-])(--(?:[a-z]+-)*[a-z]+)(?: ('[^']*'|-?\d+(?:\.\d+)?(?!\w)|[a-z]\w*))?")


def in_keywords(sentence: str) -> str:
    """`--kv-cache-dtype fp8` becomes kv_cache_dtype="fp8", `--max-model-len 64` max_model_len=64, a flag alone its name."""

    def replaced(match: re.Match[str]) -> str:
        flag, value = match[1], match[2]
        name = _NAMES.get(flag, _NAMES.get(flag.replace("--no-", "--", 1)))
        rest = "" if value is None else f" {value}"
        if name is None:
            return match[0]
        if name in _SWITCHES:
            return f"{name}={flag in _NAMES}{rest}"
        if value is None or (value[0].isalpha() and value not in _WORDS.get(name, ())):
            return f"{name}{rest}"
        return f'{name}="{value}"' if value[0].isalpha() else f"{name}={value}"

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
