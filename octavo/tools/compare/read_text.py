"""How a model reads a text: whole windows in one step, as prompts are, or each window's second half a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from octavo import batch
from octavo.engine.runner import ModelRunner
from octavo.quant.scheme import FEW_TOKENS

__all__ = ["hidden_states", "states_of"]


def hidden_states(runner: ModelRunner, window: Sequence[int]) -> Tensor:
    """Hidden states [tokens, hidden] of one window, prefilled in one step into blocks that nobody else uses."""
    return _read(runner, [window], range(len(window)))


def states_of(runner: ModelRunner, windows: Sequence[Sequence[int]], decoded_from: int) -> Iterator[Tensor]:
    """Hidden states [tokens, hidden] of each window, of its tokens from `decoded_from` on.

    These are read one at a time behind the others, by decode steps of as many windows as the cache has room for, at most
    FEW_TOKENS. 0: all tokens in one step.
    """
    if not decoded_from:
        yield from (hidden_states(runner, window) for window in windows)
        return
    room = (runner.num_blocks - 1) // _blocks(runner, len(windows[0]))
    most = max(1, min(FEW_TOKENS, room))
    for some in (windows[at : at + most] for at in range(0, len(windows), most)):
        for place, window in enumerate(some):
            _read(runner, [window], range(decoded_from), place)
        steps = [_read(runner, some, range(at, at + 1)).cpu() for at in range(decoded_from, len(some[0]))]
        yield from torch.stack(steps, 1)


def _read(runner: ModelRunner, windows: Sequence[Sequence[int]], tokens: range, place: int = 0) -> Tensor:
    """Hidden states of these tokens of each window, [windows * tokens, hidden]; `place`: of the first one in the cache."""
    each = _blocks(runner, len(windows[0]))
    spans = [
        batch.Span(window[tokens.start : tokens.stop], tokens.start, range(1 + at * each, 1 + (at + 1) * each))
        for at, window in enumerate(windows, place)
    ]
    return runner.forward(batch.build(spans, runner.block_size, runner.platform.device))


def _blocks(runner: ModelRunner, tokens: int) -> int:
    return -(-tokens // runner.block_size)
