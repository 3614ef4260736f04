"""What a server fetches of what its clients name, and the sentences that fetching has in common."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from octavo.errors import InvalidRequest, OctavoError

__all__ = ["FetchRules", "ascii_host", "printable", "split", "too_large"]


@dataclass(frozen=True)
class FetchRules:
    """What may be fetched. local_path: the directory below which file:// URLs may lie, none by default. domains: the only hosts
    that http(s) URLs may name, at redirects too, each on any port or, as `host:8080`, on one; by default any host. A host
    whose addresses are private is refused even if it is one of them. seconds: for all of a fetch, redirects and lookups
    included; lookup_seconds: of these, for finding a host's addresses once.
    """

    local_path: Path | None = None
    domains: Sequence[str] | None = None
    max_bytes: int = 32 << 20
    seconds: float = 10.0
    lookup_seconds: float = 5.0
    redirects: int = 3

    @classmethod
    def of_options(cls, local_path: str | None, domains: Sequence[str] | None) -> FetchRules:
        """Of --allowed-local-media-path and --allowed-media-domains. Raises OctavoError for what they cannot be.

        Allowed domains narrow what may be fetched and open nothing: private addresses stay refused.
        """
        if local_path is not None and not (local_path and Path(local_path).is_dir()):
            raise OctavoError(f"--allowed-local-media-path must be a directory, and '{local_path}' is none.")
        for domain in domains or ():
            try:
                _host_and_port(domain)
            except ValueError:
                raise OctavoError(
                    "--allowed-media-domains takes names of hosts, such as images.example.com or images.example.com:8080, "
                    f"not '{domain}'."
                ) from None
        return cls(Path(local_path).resolve() if local_path else None, domains)

    def allows(self, host: str, port: int) -> bool:
        """Whether `domains` has a host, by its name as `ascii_host` gives it."""
        return self.domains is None or any(_host_and_port(domain) in ((host, None), (host, port)) for domain in self.domains)


def ascii_host(host: str) -> str:
    """A host's name as DNS has it, in ASCII (IDNA) and small letters; an IPv6 address in its shortest form. Or ValueError."""
    if ":" in host:
        return str(ipaddress.IPv6Address(host))
    return host.rstrip(".").encode("idna").decode().lower()


def _host_and_port(domain: str) -> tuple[str, int | None]:
    """Of an allowed domain. Raises ValueError for what is none."""
    bare_address = domain.count(":") > 1 and not domain.startswith("[")
    parts = urlsplit(f"//[{domain}]" if bare_address else f"//{domain}")
    host = ascii_host(parts.hostname or "")
    if not host or parts.port == 0 or parts.netloc != parts.geturl()[2:] or re.search(r"[*@\s]", domain):
        raise ValueError(domain)
    return host, parts.port


def printable(url: str) -> str:
    """A URL for a sentence: short, and nothing but printable ASCII."""
    shown = "".join(c if " " < c < "\x7f" else "?" for c in url[:101])
    return shown if len(url) <= 100 else shown[:97] + "..."


def too_large(url: str, max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"{printable(url)} has more than {max_bytes >> 20} MiB; send a smaller image.")


def split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise InvalidRequest(f"{printable(url)} is not a valid URL.") from None
