"""Small files of a checkpoint, read so that whatever is in their place gets one sentence."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

__all__ = ["check_regular", "read_json", "read_text"]


def check_regular(path: Path) -> None:
    """Raises OctavoError for a path that is there and no file: opening a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise OctavoError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise OctavoError(f"{path} is {kind}, not a file; download the checkpoint again.")


def read_text(path: Path) -> str | None:
    """The text of a file, None where there is none. Raises OctavoError for what is no file, unreadable or not UTF-8."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise OctavoError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); download it again.") from None
    except OSError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file. Raises OctavoError as `read_text` does, and for other JSON."""
    text = read_text(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except RecursionError:
        raise OctavoError(f"{path} is not valid JSON (it is nested too deeply); download it again.") from None
    except ValueError as error:
        raise OctavoError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(found, dict):
        raise OctavoError(f"{path} is not valid JSON (not an object); download it again.")
    return found
