"""What a server fetches of what its clients name, and the sentences that fetching has in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from octavo.errors import InvalidRequest, OctavoError

__all__ = ["FetchRules", "split", "told", "too_large"]


@dataclass(frozen=True)
class FetchRules:
    """What may be fetched. local_path: the directory below which file:// URLs may lie, none by default. domains: the only hosts
    that http(s) URLs may name, at redirects too; by default any. seconds: for all of a fetch, redirects and resolving included.
    """

    local_path: Path | None = None
    domains: Sequence[str] | None = None
    max_bytes: int = 32 << 20
    seconds: float = 10.0
    redirects: int = 3

    @classmethod
    def of_options(cls, local_path: str | None, domains: Sequence[str] | None) -> FetchRules:
        """Of --allowed-local-media-path and --allowed-media-domains. Raises OctavoError for what they cannot be."""
        if local_path is not None and not (local_path and Path(local_path).is_dir()):
            raise OctavoError(f"--allowed-local-media-path must be a directory, and '{local_path}' is none.")
        for domain in domains or ():
            if not domain or re.search(r"[/*@\s]", domain):
                raise OctavoError(f"--allowed-media-domains takes names of hosts, such as images.example.com, not '{domain}'.")
        return cls(Path(local_path).resolve() if local_path else None, domains)


def told(url: str) -> str:
    """A URL for a sentence: short, and nothing but printable ASCII."""
    printable = "".join(c if " " < c < "\x7f" else "?" for c in url[:101])
    return printable if len(url) <= 100 else printable[:97] + "..."


def too_large(url: str, max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"{told(url)} has more than {max_bytes >> 20} MiB; send a smaller image.")


def split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise InvalidRequest(f"{told(url)} is not a valid URL.") from None
