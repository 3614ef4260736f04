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

__all__ = ["Detokenizer", "read_prompt"]

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
        self.length = 0  # characters of all the text so far, shown or held back
        # A prompt of token ids may end inside a character, which the first token then completes, or else it is not shown.
        self._utf8.decode(b"".join(map(self._token_bytes, prompt_token_ids[-4:])))
        self._begun: bytes = self._utf8.getstate()[0]

    def step(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come."""
        text = self._decode(b"" if token_id in self._skipped else self._token_bytes(token_id))
        self.length += len(text)
        if not self._stops:
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
