"""Text out of tokens, one token at a time.

A token is some bytes of UTF-8 (see Tokenizer.token_bytes), so the text grows through an incremental UTF-8 decoder: each
token is looked at once, and half a character stays inside until its other half comes. The library's DecodeStream decodes
a window of tokens twice for each new one, and its window grows for as long as the bytes stay invalid.

Text that may turn out to be the start of a stop string is held back too.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache

from octavo.messages import SamplingParams
from octavo.text.patterns import START, Patterns
from octavo.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "read_prompt"]

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one generation. `stopped` becomes the stop string that ended it."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()):
        self.stopped: str | None = None
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._stops = _patterns(params.stop) if params.stop else None
        self._state = START
        self._include_stop = params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # tokens still to come before a stop string counts
        self._held = ""
        self._utf8 = _UTF8("replace")
        self.length = 0  # characters of all the text so far, shown or held back
        # A prompt of token ids may end inside a character, which the first token then completes, or else it is not shown.
        self._utf8.decode(b"".join(map(self._token_bytes, prompt_token_ids[-4:])))
        self._begun: bytes = self._utf8.getstate()[0]

    def step(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come."""
        text = self._decode(b"" if token_id in self._skipped else self._token_bytes(token_id))
        self.length += len(text)
        if self._stops is None:
            return text
        self._unchecked -= 1
        return self._release(text)

    def finish(self) -> str:
        """The text that was held back, now that no other token will come."""
        return self._release(self._decode(b"", final=True), final=True)

    def _decode(self, new: bytes, final: bool = False) -> str:
        text = self._utf8.decode(new, final)
        if self._begun and (new or final):
            completed = (self._begun + new).startswith("\ufffd".encode())  # that character itself, in its own three bytes
            if text.startswith("\ufffd") and not completed:  # stands for the prompt's half
                text = text[1:]
            self._begun = b""
        return text

    def _release(self, text: str, final: bool = False) -> str:
        """The text that is sure now. Of matches the one that is complete first counts, so that the cut does not depend on the
        tokens, and of those that end there the longest. Each character is looked at once, however many stop strings there are.
        """
        if self._stops is None:
            return text
        held, state = self._held, self._state
        for count, character in enumerate(text, len(held) + 1):
            state = self._stops.after(state, character)
            if self._unchecked < 0 and (found := self._stops.ended(state)) is not None:
                self.stopped, self._held = str(found), ""
                return (held + text)[: count if self._include_stop else count - len(found)]
        text, self._state = held + text, state
        keep = 0 if final else self._stops.begun(state)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


@lru_cache(maxsize=16)  # the n sequences of a request share one
def _patterns(stops: tuple[str, ...]) -> Patterns[str]:
    return Patterns(stops)


def read_prompt(tokenizer: Tokenizer, token_ids: Sequence[int], given: str | None = None) -> tuple[str, list[int]]:
    """The text of a prompt, `given` if it was text, and where in it each token's text begins.

    A character that the prompt ends inside of is not part of its text: what is generated completes it, or nothing does.
    """
    utf8, skipped = _UTF8("replace"), tokenizer.special_ids if given is None else frozenset[int]()
    pieces, offsets, length = [], [], 0
    for token_id in token_ids:
        offsets.append(length)
        pieces.append(utf8.decode(b"" if token_id in skipped else tokenizer.token_bytes(token_id)))
        length += len(pieces[-1])
    if given is None:
        return "".join(pieces), offsets
    ahead = length - len(given)  # what the tokenizer put before the text: a BOS, or a space
    return given, [min(max(0, offset - ahead), len(given)) for offset in offsets]
