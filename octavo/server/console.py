"""Terminal output of a server: the load report once it is ready."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from octavo.errors import OctavoError
from octavo.frontend.loading_bar import put, say

if TYPE_CHECKING:
    from octavo.server.serving import Served

__all__ = ["DEMO_PROMPT", "greet", "say"]

DEMO_PROMPT = "def read(self"
DEMO_SEED = 3  # gives the same answer at every start


async def greet(
    served: Served, listening: Callable[[], bool], address: str, demo: bool, started: float, keyed: bool = False
) -> None:
    """Prints the load report, an answer of the demo model with a command to try, and that the server is ready.

    keyed: whether a request needs a key.
    """
    for line in served.engine.info.report:
        put(line, sys.stdout)
    if demo and served.engine.tokenizer is not None:
        try:
            await _show(served)
        except OctavoError as error:
            say(f"octavo: {error}")
        local = _local(address)
        body = f'{{"model": "{served.names[0]}", "prompt": "class Stack:", "max_tokens": 64}}'
        headers = "-H 'Content-Type: application/json'" + " -H 'Authorization: Bearer KEY'" * keyed
        put(f"\nTry it:\n  curl {local}/v1/completions {headers} -d '{body}'\n", sys.stdout)
    while not listening():
        await asyncio.sleep(0.005)
    put(f"Octavo is ready on {_reachable(address)} ({time.time() - started:.1f} s)", sys.stdout)


def _reachable(address: str) -> str:
    """A URL that can be opened, where the server listens on all addresses."""
    scheme, _, listened = address.partition("://")
    host, _, port = listened.rpartition(":")
    everywhere = host in ("0.0.0.0", "[::]")
    return f"{scheme}://localhost:{port} and this machine's other addresses" if everywhere else address


def _local(address: str) -> str:
    """What curl needs to reach the server from this machine, before the path."""
    if address.startswith(("unix:", "unixs:")):  # the second speaks TLS
        kind, _, path = address.partition(":")
        return f"--unix-socket {path} {'-k https' if kind == 'unixs' else 'http'}://localhost"
    scheme, port = address.partition(":")[0], address.rpartition(":")[2]
    return f"{'-k ' if scheme == 'https' else ''}{scheme}://localhost:{port}"


async def _show(served: Served) -> None:
    from octavo.messages import SamplingParams

    put(f"\nA first completion:\n\n{DEMO_PROMPT}", sys.stdout, end="")
    params = SamplingParams(**{**served.engine.default_sampling, "max_tokens": 64, "seed": DEMO_SEED})
    began, tokens = time.monotonic(), 0
    async with aclosing(served.engine.generate(await served.encode(DEMO_PROMPT), params, "demo")) as deltas:
        async for delta in deltas:
            tokens += len(delta.token_ids)
            put(delta.text, sys.stdout, end="")
    put(f"\n\n({tokens} tokens in {time.monotonic() - began:.2f} s)", sys.stdout)
