"""An image's URL -> its bytes: `data:` and http(s) URLs, and files where the server allows a directory."""

from __future__ import annotations

import asyncio
import binascii
import os
import stat
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from octavo.errors import InvalidRequest
from octavo.vision.fetch_rules import FetchRules, printable, split, too_large
from octavo.vision.public_http import get_public

__all__ = ["FetchRules", "decode_data_url", "fetch"]

LONGEST_URL = 1 << 14  # characters; nobody has longer ones, and parsing megabytes would hold up the event loop


async def fetch(url: str, rules: FetchRules) -> bytes:
    """The bytes that `url` stands for. Raises InvalidRequest, one sentence, for whatever may not or cannot be fetched."""
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return decode_data_url(url, rules.max_bytes)
    if len(url) > LONGEST_URL:
        raise InvalidRequest(f"{printable(url)} has {len(url)} characters; at most {LONGEST_URL} are read, but of data: URLs.")
    if scheme == "file":
        return await asyncio.to_thread(_local, url, rules)
    if scheme not in ("http", "https"):
        raise InvalidRequest(f"An image's URL should begin with data:, https:// or http://, and {printable(url)} does not.")
    try:
        async with asyncio.timeout(rules.seconds):
            return await get_public(url, rules)
    except TimeoutError:
        raise InvalidRequest(
            f"{printable(url)} did not arrive within {rules.seconds:g} seconds; send it as a data: URL."
        ) from None


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes within a data: URL. Raises InvalidRequest, one sentence, for what is none, or is larger."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest("An image's data: URL should read data:image/png;base64, followed by the file in base64.")
    if len(payload) > max_bytes * 4 // 3 + 4:  # line ends and escapes count too: nobody needs many
        raise too_large(head + comma, max_bytes)
    with suppress(ValueError):
        return binascii.a2b_base64(payload, strict_mode=True)
    try:
        return binascii.a2b_base64("".join(unquote(payload).split()), strict_mode=True)
    except ValueError:
        raise InvalidRequest("What follows ;base64, in an image's data: URL is not valid base64; it may be cut off.") from None


def _local(url: str, rules: FetchRules) -> bytes:
    if rules.local_path is None:
        raise InvalidRequest("This server reads no file:// URLs; it would have to be started with --allowed-local-media-path.")
    parts = split(url)
    root = rules.local_path.resolve()
    outside = InvalidRequest(f"{printable(url)} is not below the directory that --allowed-local-media-path names.")
    try:
        path = Path(unquote(parts.path)).resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, a null byte
        raise outside from None
    if parts.netloc not in ("", "localhost") or not path.is_relative_to(root):
        raise outside
    try:
        # A pipe would wait for ever; a link that took the file's place since may lead anywhere.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidRequest(f"{printable(url)} is not a file.")
            data = file.read(rules.max_bytes + 1)
    except OSError as error:
        raise InvalidRequest(f"{printable(url)} cannot be read: {error.strerror}.") from None
    if len(data) > rules.max_bytes:
        raise too_large(url, rules.max_bytes)
    return data
