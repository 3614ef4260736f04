"""Several streams as one: what begins when, and what ends when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from octavo.errors import InvalidRequest
from octavo.server.http import merge


class Streams:
    """Each brings its number once it is let go, and fails if it is told to."""

    def __init__(self, count: int, wrong: int | None = None):
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.go = asyncio.Semaphore(0)
        self.streams = [self._stream(number, number == wrong) for number in range(count)]

    async def _stream(self, number: int, wrong: bool) -> AsyncGenerator[int, None]:
        self.begun.append(number)
        try:
            await self.go.acquire()
            if wrong:
                raise InvalidRequest("no")
            yield number
            yield -number
        finally:
            self.ended.append(number)


def test_what_waits_costs_at_most_so_much() -> None:
    async def main() -> None:
        of = Streams(5)
        got: list[tuple[int, int]] = []

        async def read() -> None:
            async with aclosing(merge(of.streams, [4, 4, 4, 100, 1], 8)) as merged:
                got.extend([pair async for pair in merged])

        reading = asyncio.ensure_future(read())
        for begun in ([0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
            await asyncio.sleep(0.01)
            assert of.begun == begun  # one that costs too much begins alone
            of.go.release()
        await reading
        assert sorted(got) == sorted([(i, i) for i in range(5)] + [(i, -i) for i in range(5)])

    asyncio.run(main())


def test_one_that_fails_ends_all() -> None:
    async def main() -> None:
        of = Streams(6, wrong=1)
        for _ in range(2):
            of.go.release()

        async def read() -> None:
            async with aclosing(merge(of.streams, [1] * 6, 4)) as merged:
                async for _ in merged:
                    pass

        with pytest.raises(InvalidRequest):
            await read()
        begun = list(of.begun)
        await asyncio.sleep(0.01)
        assert of.begun == begun  # nothing begins any more
        assert sorted(of.ended) == sorted(begun)

    asyncio.run(main())
