"""Why a server does not answer, found out by asking it the other way: HTTP where HTTPS failed, and HTTPS where HTTP did."""

from __future__ import annotations

import http.client
import socket
import ssl
from contextlib import closing
from urllib.parse import urlsplit

__all__ = ["no_answer", "other_scheme"]

PATIENCE = 5  # seconds for a server's answer to what only a program asks


def no_answer(url: str, error: Exception) -> str | None:
    """Why a request to `url` ended with `error`, and what to do; None where no server may be there."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"The certificate of the server at {url} is not trusted ({error.verify_message}); "
            "name a file of its issuer's certificate in $SSL_CERT_FILE."
        )
    if isinstance(error, ssl.SSLError):
        return other_scheme(url) or f"The server at {url} and this program agree on no TLS ({error.reason or error})."
    return other_scheme(url) if isinstance(error, ConnectionResetError | http.client.BadStatusLine) else None


def other_scheme(url: str) -> str | None:
    """That the server at `url` speaks HTTPS, if `url` says HTTP, or the other way round; None where it does not."""
    parts = urlsplit(url)
    if parts.scheme == "https" and _speaks_http(parts.hostname or "", parts.port or 443):
        return f"The server at {parts.netloc} speaks HTTP, without TLS; use http://{parts.netloc}."
    if parts.scheme == "http" and _speaks_tls(parts.hostname or "", parts.port or 80):
        return f"The server at {parts.netloc} speaks HTTPS; use https://{parts.netloc}."
    return None


def _speaks_http(host: str, port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=PATIENCE)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status != 400  # with which some servers of HTTPS answer
    except (OSError, http.client.HTTPException):
        return False


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        with (
            socket.create_connection((host, port), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ValueError):
        return False
