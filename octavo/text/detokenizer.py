"""Text out of tokens, one token at a time.

A token is some bytes of UTF-8 (see Tokenizer.token_bytes), so the text grows through an incremental UTF-8 decoder: each
token is looked at once, and half a character stays inside until its other half comes. The library's DecodeStream decodes
a window of tokens twice for each new one, and its window grows for as long as the bytes stay invalid.

Text that may turn out to be the start of a stop string is held back too.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from octavo.messages import SamplingParams
from octavo.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one generation. `stopped` becomes the stop string that ended it."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()):
        self.stopped: str | None = None
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._stops = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # tokens still to come before a stop string counts
        self._held = ""
        self._utf8 = _UTF8("replace")
        # A prompt of token ids may end inside a character, which the first token then completes.
        self._utf8.decode(b"".join(map(self._token_bytes, prompt_token_ids[-4:])))

    def step(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come."""
        text = self._utf8.decode(b"" if token_id in self._skipped else self._token_bytes(token_id))
        if not self._stops:
            return text
        self._unchecked -= 1
        return self._release(text)

    def finish(self) -> str:
        """The text that was held back, now that no other token will come."""
        return self._release(self._utf8.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool = False) -> str:
        text, old = self._held + text, len(self._held)
        if self._unchecked < 0 and (match := self._first_match(text, old)):
            start, end, self.stopped = match
            self._held = ""
            return text[: end if self._include_stop else start]
        keep = 0 if final else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_match(self, text: str, old: int) -> tuple[int, int, str] | None:
        """Start, end and stop string of the match that is complete first, so that the cut does not depend on the tokens.

        A match ends after `old`: what lies before was looked at already, or came too early to count.
        """
        found = []
        for stop in self._stops:
            if (start := text.find(stop, max(0, old - len(stop) + 1))) >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        end, start, stop = min(found)
        return start, end, stop

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
