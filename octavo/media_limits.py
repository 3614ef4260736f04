"""How many images and videos a request may have: --limit-mm-per-prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError

__all__ = ["MAX_MEDIA", "read_media_limits"]

MAX_MEDIA = 999  # images of a request, where --limit-mm-per-prompt says nothing; vLLM's number


def read_media_limits(given: str | Mapping[str, Any] | None) -> dict[str, int] | None:
    """--limit-mm-per-prompt as numbers: JSON as vLLM's command line takes it, or image=4,video=0, or a mapping. A value may be
    vLLM's object with a `count`. Raises OctavoError, one sentence, for anything else."""
    wrong = OctavoError(
        f'--limit-mm-per-prompt must be like \'{{"image": 4, "video": 0}}\', with numbers of 0 or more, not {given!r}.'
    )
    if given is None:
        return None
    if isinstance(given, str):
        try:
            pairs = [pair.split("=") for pair in given.split(",")]
            read = json.loads(given) if given.lstrip().startswith("{") else {name.strip(): int(n) for name, n in pairs}
        except (ValueError, RecursionError):
            raise wrong from None
        given = read
    found = {}
    for name, value in given.items():
        count = value.get("count") if isinstance(value, Mapping) else value
        if name not in ("image", "video", "audio") or type(count) is not int or count < 0:
            raise wrong
        found[name] = count
    found.pop("audio", None)  # no model that is served hears
    return found
