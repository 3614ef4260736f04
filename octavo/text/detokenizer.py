"""Incremental detokenization, one token at a time.

A token is some bytes of UTF-8 (see Tokenizer.token_bytes), so the text grows through an incremental UTF-8 decoder: each token
is decoded once, and part of a character is held until the rest arrives. The library's DecodeStream decodes a window of tokens
twice for each new one, and its window grows as long as the bytes stay invalid.

Text that may be the start of a stop string is held back too.
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
    """The text of one sequence. `stopped` becomes the stop string that ended it."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()):
        self.stopped: str | None = None
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._stops = _patterns(params.stop) if params.stop else None
        self._state = START
        self._include_stop = params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # tokens until stop strings count
        self._held = ""
        self._utf8 = _UTF8("replace")
        self.length = 0  # characters of the whole text, including text held back
        # A prompt of token ids may end inside a character. The first token may complete it; otherwise it is not shown.
        self._utf8.decode(b"".join(map(self._token_bytes, prompt_token_ids[-4:])))
        self._begun: bytes = self._utf8.getstate()[0]
        self._whole = not self._begun  # whether no part of a character is held

    def step(self, token_id: int) -> str:
        """Adds `token_id`. Returns the text that can be shown now."""
        text = self._decode(b"" if token_id in self._skipped else self._token_bytes(token_id))
        self.length += len(text)
        if self._stops is None:
            return text
        self._unchecked -= 1
        return self._release(text)

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        return self._release(self._decode(b"", final=True), final=True)

    def _decode(self, new: bytes, final: bool = False) -> str:
        if self._whole:
            try:  # most tokens are whole characters, and the incremental decoder takes several times as long
                return new.decode()
            except UnicodeDecodeError:
                pass
        text = self._utf8.decode(new, final)
        self._whole = not self._utf8.getstate()[0]
        if self._begun and (new or final):
            completed = (self._begun + new).startswith("\ufffd".encode())  # U+FFFD itself, spelled in its three bytes
            if text.startswith("\ufffd") and not completed:  # replaces the prompt's partial character
                text = text[1:]
            self._begun = b""
        return text

    def _release(self, text: str, final: bool = False) -> str:
        """The text that is certain now. Of several stop strings the one that is complete first counts, so that the cut does
        not depend on tokenization; of those complete at the same character, the longest. Each character is matched once.
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


@lru_cache(maxsize=16)  # shared by the n sequences of a request
def _patterns(stops: tuple[str, ...]) -> Patterns[str]:
    return Patterns(stops)


def read_prompt(tokenizer: Tokenizer, token_ids: Sequence[int], given: str | None = None) -> tuple[str, list[int]]:
    """The text of a prompt (`given` if it was text), and the offset in it where each token's text begins.

    A partial character at the prompt's end is not part of its text. The generated text may complete it.
    """
    utf8, skipped = _UTF8("replace"), tokenizer.special_ids if given is None else frozenset[int]()
    pieces, offsets, length = [], [], 0
    for token_id in token_ids:
        offsets.append(length)
        pieces.append(utf8.decode(b"" if token_id in skipped else tokenizer.token_bytes(token_id)))
        length += len(pieces[-1])
    if given is None:
        return "".join(pieces), offsets
    ahead = length - len(given)  # characters that the tokenizer put before the text: a BOS, or a space
    return given, [min(max(0, offset - ahead), len(given)) for offset in offsets]
