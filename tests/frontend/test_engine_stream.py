"""A request's tap: which deltas pass its reader, and that none overtakes another."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

import pytest

from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.engine_stream import DeltaQueue, End, EngineStream, Tap
from octavo.frontend.outputs import Delta, OutputProcessor
from octavo.messages import EngineRequest, SamplingParams, TokenOutput


class Request:
    """One sequence without text. `got`: what the reader and the tap got, in order; `saw`: what the tap reported as taken."""

    def __init__(self, take: Callable[[Delta], bool] | None):
        self.got: list[tuple[str, list[int] | str]] = []
        self.saw: list[list[int]] = []
        self.queue = DeltaQueue()
        self.tap = Tap() if take is None else Tap(take, lambda delta: self.saw.append(delta.token_ids))
        self.stream = EngineStream(OutputProcessor(EngineRequest("r", [1], SamplingParams()), None), self.queue, self.tap)

    def tapped(self, delta: Delta) -> bool:
        self.got.append(("tap", delta.token_ids))
        return True

    async def read(self) -> None:
        while True:
            item = await self.queue.get()
            self.got.append(("reader", str(item) if isinstance(item, OctavoError) else item.token_ids))
            await asyncio.sleep(0)  # as a reader that sends

    def put(self, *tokens: int, **how: str) -> list[End]:
        return [self.stream.take(TokenOutput("r", [token], **how)) for token in tokens]  # type: ignore[arg-type]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def run(test: Callable[[Request], object], take: Callable[[Delta], bool] | None = None, tapped: bool = True) -> Request:
    async def main() -> Request:
        request = Request(take)
        if tapped and take is None:
            request.tap.take = request.tapped
        reader = asyncio.ensure_future(request.read())
        outcome = test(request)
        if asyncio.iscoroutine(outcome):
            await outcome
        await turns(20)
        reader.cancel()
        return request

    return asyncio.run(main())


def test_nothing_passes_a_reader_that_is_behind() -> None:
    async def test(request: Request) -> None:
        request.put(1)  # before the reader waits for anything
        request.put(2)
        await turns()
        request.put(3, 4)
        request.put(5, finish_reason="length")

    assert run(test).got == [
        ("reader", [1]),
        ("reader", [2]),
        ("tap", [3]),
        ("tap", [4]),
        ("reader", [5]),
    ]


def test_deltas_wait_for_the_reader_behind_one_that_was_declined() -> None:
    ready = False

    def take(delta: Delta) -> bool:
        return ready

    async def test(request: Request) -> None:
        nonlocal ready
        await turns()
        request.put(1)  # declined
        ready = True
        request.put(2)  # the reader has not got the first
        await turns()
        request.put(3)

    request = run(test, take)
    assert request.got == [("reader", [1]), ("reader", [2])]
    assert request.saw == [[3]]


def test_errors_go_to_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    def fail(delta: Delta) -> bool:
        raise ValueError("a bug")

    ends: list[End] = []

    async def test(request: Request) -> None:
        await turns()
        ends.extend(request.put(1))
        await turns()
        ends.extend(request.put(2, error="no more"))

    request = run(test, fail)
    assert [who for who, _ in request.got] == ["reader", "reader"]
    assert "cannot be turned into text" in str(request.got[0][1])
    assert request.got[1][1] == "no more"
    assert ends == [End.ABORT, End.ENDED]


def test_without_a_tap_the_reader_gets_all() -> None:
    async def test(request: Request) -> None:
        await turns()
        request.put(1, 2)

    assert run(test, tapped=False).got == [("reader", [1]), ("reader", [2])]


def test_an_error_of_the_request_is_its_readers() -> None:
    """Not one of the server's: what a tap says of a delta, it says of the request."""

    def refuse(delta: Delta) -> bool:
        raise InvalidRequest("This cannot be echoed.")

    async def test(request: Request) -> None:
        await turns()
        assert request.put(5) == [End.ABORT]

    assert run(test, refuse).got == [("reader", "This cannot be echoed.")]


def test_a_closed_tap_holds_nobody() -> None:
    request = Request(lambda delta: True)
    request.tap.take = request.tapped
    left = weakref.ref(request)
    request.tap.close()
    del request
    assert left() is None
