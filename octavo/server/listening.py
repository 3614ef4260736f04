"""What the server listens on: a port or a Unix socket, and TLS. All of it is tried before the model is loaded."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import ssl
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

__all__ = ["address_of", "bind", "bind_unix", "tls_settings", "unlink_unix"]


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, taken before the model is loaded: whoever must wait should not wait in vain.

    Clients that connect while the model is loading wait for it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # bound alone, the port would still be free for a second server that is starting too
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OctavoError(f"Port {port} is in use; stop what uses it, or choose another with --port.") from error
        raise OctavoError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error
    return listener


def bind_unix(path: str) -> socket.socket:
    """As `bind`, a Unix socket at `path` (--uds). A socket that a server has left behind there is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OctavoError(f"--uds {path} exists and is in use, or no socket; give another path.") from error
        raise OctavoError(f"Cannot listen on --uds {path}: {error.strerror or error}.") from error
    return listener


def _is_stale(path: str) -> bool:
    """Whether there is a socket that nobody answers."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def address_of(args: argparse.Namespace, listener: socket.socket) -> str:
    """The URL to show for the server; of a Unix socket its path."""
    if args.uds is not None:
        return f"unix{'s' if args.ssl_certfile else ''}:{args.uds}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"{'https' if args.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}"


def unlink_unix(args: argparse.Namespace) -> None:
    """Removes the Unix socket, so that nobody waits for a server that has ended."""
    if args.uds is not None:
        with suppress(OSError):
            os.unlink(args.uds)


def tls_settings(args: argparse.Namespace) -> dict[str, Any]:
    """uvicorn's settings of the --ssl-* flags. Raises OctavoError for files that cannot be used."""
    given = {
        name: getattr(args, name) for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return {}
    if args.ssl_certfile is None:
        flags = ", ".join("--" + name.replace("_", "-") for name in asked)
        raise OctavoError(f"{flags} needs --ssl-certfile, the server's certificate; give both, or neither.")
    if args.ssl_cert_reqs and args.ssl_ca_certs is None:
        raise OctavoError("--ssl-cert-reqs asks clients for certificates; give --ssl-ca-certs too, whose they must be.")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if (path := asked.get(name)) is not None and not Path(path).is_file():
            raise OctavoError(f"--{name.replace('_', '-')} {path} is no file; give a file in PEM format.")
    _try(asked)
    return asked


def _try(asked: dict[str, Any]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def password() -> str:
        raise OctavoError(f"--ssl-keyfile {key} is encrypted; give a key without a password.")

    key = asked.get("ssl_keyfile") or asked["ssl_certfile"]
    more = "" if "ssl_keyfile" in asked else "; give its key with --ssl-keyfile"
    try:
        context.load_cert_chain(asked["ssl_certfile"], asked.get("ssl_keyfile"), password)
    except OSError as error:  # of which SSLError is one
        raise OctavoError(
            f"--ssl-certfile {asked['ssl_certfile']} cannot be used with the key in {key} ({_reason(error)}){more}."
        ) from error
    for name, use in (("ssl_ca_certs", context.load_verify_locations), ("ssl_ciphers", context.set_ciphers)):
        if (value := asked.get(name)) is not None:
            try:
                use(value)
            except OSError as error:
                raise OctavoError(f"--{name.replace('_', '-')} {value} cannot be used ({_reason(error)}).") from error


def _reason(error: OSError) -> str:
    """OpenSSL's word for what is wrong, such as KEY_VALUES_MISMATCH, or the system's."""
    return str(getattr(error, "reason", None) or error.strerror or error.args[0])
