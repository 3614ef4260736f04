"""GET over http(s) from hosts of the internet alone.

Whoever sends a request names the URL, so the server must not become a way into the network that it stands in. A host's name is
resolved once, all of its addresses must be public, and the connection goes to an address that was checked: a name that resolves
otherwise the next time ("DNS rebinding") is never asked again. Each redirect is checked as the first URL was. Proxies that the
environment names are not used, since what they connect to could not be checked.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin

import httptools

from octavo.errors import InvalidRequest
from octavo.version import __version__
from octavo.vision.fetch_rules import FetchRules, ascii_host, printable, split, too_large

__all__ = ["get_public", "is_public"]

_HEADER_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
MAX_LOOKUPS = 256  # at a time; the system may take half a minute to give one up
_LOOKUPS = threading.BoundedSemaphore(MAX_LOOKUPS)
# Which not every version of Python knows: protocol assignments (RFC 6890, a cloud's metadata among them), anycast relays of
# 6to4 (RFC 7526), documentation (RFC 9637); and an address of the internet's at which machines of a cloud see their host.
_RESERVED = (
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv4Network("168.63.129.16/32"),
    ipaddress.IPv6Network("3fff::/20"),
)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: not private, shared, link-local, loopback, multicast or reserved, nor an
    IPv6 address that stands for an IPv4 address, which a gateway could turn into any of those.
    """
    with suppress(ValueError):
        ip = ipaddress.ip_address(address)
        if not ip.is_global or any(ip in network for network in _RESERVED):
            return False
        if isinstance(ip, ipaddress.IPv4Address):
            return not ip.is_multicast
        isatap = (int(ip) >> 32) & 0xFCFFFFFF == 0x5EFE  # RFC 5214, whatever its universal and group bits are
        unicast = ip in ipaddress.IPv6Network("2000::/3") and ip.scope_id is None
        return unicast and ip.sixtofour is None and ip.teredo is None and not isatap
    return False


class _Place(NamedTuple):
    """Where a URL leads: host and port, and the target to ask for there."""

    url: str
    secure: bool
    host: str
    port: int
    target: str

    @property
    def header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def _place(url: str, rules: FetchRules) -> _Place:
    """Raises InvalidRequest where no connection may be made."""
    parts = split(url)
    if parts.scheme not in ("http", "https"):
        raise InvalidRequest(f"A redirect leads to {printable(url)}, which is not an http(s) URL.")
    secure = parts.scheme == "https"
    try:
        host = ascii_host(parts.hostname or "")
        port = (443 if secure else 80) if parts.port is None else parts.port
    except ValueError:
        host, port = "", 0
    if not host or not port or not re.fullmatch(r"[0-9a-z_.:%-]+", host):
        raise InvalidRequest(f"{printable(url)} is not a valid URL.")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(f"The URL of an image at {host} has a user name or password, which are not sent; leave them out.")
    if not rules.allows(host, port):
        raise InvalidRequest(f"This server fetches images from the hosts of --allowed-media-domains alone, and {host} is none.")
    if re.search(r"[\ud800-\udfff]", url):
        raise InvalidRequest("The URL of an image holds half of a surrogate pair, which is no character.")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return _Place(url, secure, host, port, target)


async def get_public(url: str, rules: FetchRules) -> bytes:
    """The body that `url` is answered with. Raises InvalidRequest, one sentence; how long it takes is the caller's to limit."""
    first = url
    for _ in range(rules.redirects + 1):
        place = _place(url, rules)
        answer = await _get(place, rules)
        if answer.status == 200:
            return bytes(answer.body)
        location = answer.headers.get(b"location")
        if answer.status not in _REDIRECTS or location is None:
            raise InvalidRequest(f"{printable(url)} was answered with HTTP status {answer.status} instead of an image.")
        try:
            url = urljoin(url, location.decode("latin-1"))
        except ValueError:
            raise InvalidRequest(f"{printable(url)} is redirected to what is not a valid URL.") from None
    raise InvalidRequest(f"{printable(first)} is redirected more than {rules.redirects} times; give the URL that it leads to.")


async def _addresses(place: _Place, rules: FetchRules) -> list[str]:
    """Of the host. All must be public: a name that is partly of this network is not the internet's."""
    try:
        async with asyncio.timeout(rules.lookup_seconds):
            found = await _in_own_thread(partial(socket.getaddrinfo, place.host, place.port, type=socket.SOCK_STREAM))
    except TimeoutError:
        seconds = f"{rules.lookup_seconds:g} seconds"
        raise InvalidRequest(f"The host {place.host} of an image's URL was not found within {seconds}.") from None
    except (OSError, UnicodeError):
        raise InvalidRequest(f"The host {place.host} of an image's URL cannot be found.") from None
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    if not addresses or not all(map(is_public, addresses)):
        raise InvalidRequest(f"The host {place.host} has no public address, and images are fetched from such alone.")
    return addresses


async def _in_own_thread(lookup: Callable[[], Any]) -> Any:
    """What `lookup` returns or raises. Nothing can end it early: no other waits for its thread, nor does the process's end."""
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    def settle(put: Callable[[Any], None], value: Any) -> None:
        if not answer.done():  # nobody waits any more
            put(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = answer.set_result, lookup()
        except Exception as error:
            outcome = answer.set_exception, error
        finally:
            _LOOKUPS.release()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    if not _LOOKUPS.acquire(blocking=False):
        raise InvalidRequest("Too many hosts of images are being looked up now; try again, or send data: URLs.")
    try:
        threading.Thread(target=run, name="lookup", daemon=True).start()
    except RuntimeError:  # of the system: no more threads
        _LOOKUPS.release()
        raise InvalidRequest("No thread is left to look up the host of an image; try again, or send data: URLs.") from None
    return await answer


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Answer:
    """What a server answers, as httptools' parser tells it."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 0, dict[bytes, bytes](), bytearray()
        self.headed = self.complete = False
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.headed = self.status >= 200  # what comes before is of the kind of 103 Early Hints

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = self.headed
        if not self.complete:
            self.headers.clear()

    @property
    def to_the_end(self) -> bool:
        """Whether the end of the connection is the body's, which then has no length."""
        return self.headed and not {b"content-length", b"transfer-encoding"} & set(self.headers)


async def _get(place: _Place, rules: FetchRules) -> _Answer:
    reader, writer = await _connect(place, rules)
    try:
        writer.write(
            f"GET {place.target} HTTP/1.1\r\nHost: {place.header}\r\nUser-Agent: octavo/{__version__}\r\n"
            "Accept: image/*, */*;q=0.1\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode()
        )
        return await _read(reader, place, rules)
    except (OSError, EOFError, httptools.HttpParserError):
        raise InvalidRequest(f"{printable(place.url)} was not answered as HTTP says, or only in part.") from None
    finally:
        writer.transport.abort()  # closing TLS politely would wait for the other side


async def _connect(place: _Place, rules: FetchRules) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for address in await _addresses(place, rules):
        with suppress(OSError):
            if place.secure:
                return await asyncio.open_connection(address, place.port, ssl=_tls(), server_hostname=place.host)
            return await asyncio.open_connection(address, place.port)
    raise InvalidRequest(
        f"{printable(place.url)} cannot be reached" + (", or its certificate is not valid." * place.secure or ".")
    )


async def _read(reader: asyncio.StreamReader, place: _Place, rules: FetchRules) -> _Answer:
    """The answer; of one that is not a 200, the headers. Raises InvalidRequest when it grows too large, EOFError when it ends
    early.
    """
    answer, received = _Answer(), 0
    while not answer.complete:
        data = await reader.read(1 << 16)
        if not data and answer.to_the_end:
            break
        if not data:
            raise EOFError
        received += len(data)
        answer.parser.feed_data(data)
        if answer.headed and answer.status != 200:
            break
        if answer.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise InvalidRequest(
                f"{printable(place.url)} is sent compressed, though it was asked for as it is; send a data: URL."
            )
        length = answer.headers.get(b"content-length", b"0")
        if len(answer.body) > rules.max_bytes or (length.isdigit() and int(length[:20]) > rules.max_bytes):
            raise too_large(place.url, rules.max_bytes)
        if not answer.headed and received > _HEADER_BYTES:
            raise InvalidRequest(f"{printable(place.url)} is answered with headers of more than {_HEADER_BYTES >> 10} KiB.")
        if received > 2 * rules.max_bytes + _HEADER_BYTES:  # chunks of a byte, each with its own lines
            raise too_large(place.url, rules.max_bytes)
    return answer
