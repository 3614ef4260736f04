"""Structured output: masks of allowed next tokens, computed by llguidance."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import InvalidRequest, OctavoError
from octavo.text.checkpoint_text import no_tokenizer
from octavo.text.tokenizer import read_tokenizer

__all__ = ["Grammar", "GrammarCompiler", "GrammarSpeed"]


# Alternatives become items. 2,000 tools need more than the library's default of 2,000, and take milliseconds a step.
LIMITS: dict[str, Any] = {"max_items_in_row": 10_000, "step_max_items": 100_000, "verbose_errors": False}
SLOW = 0.02  # seconds for computing a token mask; most grammars take a thousandth of it


class GrammarCompiler:
    """Compiles grammars. The tokenizer is read when the first request needs it."""

    def __init__(self, directory: Path, vocab_size: int):
        self.directory, self.vocab_size = directory, vocab_size
        self._tokenizers: dict[frozenset[int], Any] = {}

    def compile(self, grammar: str, eos_token_ids: frozenset[int]) -> Grammar:
        """`grammar` is in llguidance's format. Raises InvalidRequest if it does not compile with this vocabulary."""
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = self._tokenizer(eos_token_ids)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise InvalidRequest(
                f"the grammar of the structured output does not compile: {matcher.get_error()}", "response_format"
            )
        return Grammar(matcher, self.vocab_size, tokenizer.vocab_size)

    def _tokenizer(self, eos_token_ids: frozenset[int]) -> Any:
        """llguidance's form of the tokenizer. Raises OctavoError where there is none, or of a kind that it does not read."""
        from llguidance import LLTokenizer

        if eos_token_ids not in self._tokenizers:
            if no_tokenizer(self.directory):
                raise OctavoError(f"structured output needs a tokenizer, and {self.directory} has no tokenizer.json.")
            read = read_tokenizer(self.directory)
            size = max(self.vocab_size, *(token + 1 for token in read.get_vocab().values()))  # it may have more than the model
            try:
                made = LLTokenizer(read.to_str(), n_vocab=size, eos_token=sorted(eos_token_ids) or None)
            except ValueError as error:
                raise OctavoError(f"structured output cannot be had with this model's tokenizer: {error}.") from None
            self._tokenizers[eos_token_ids] = made
        return self._tokenizers[eos_token_ids]


@dataclass(slots=True)
class GrammarSpeed:
    """Whether a request's grammar is slow, shared by its n sequences."""

    slow: bool = False  # computing a token mask once took more than SLOW seconds


class Grammar:
    """The grammar state of one sequence of a model of `vocab_size` tokens. tokens: of the tokenizer, as many at least."""

    def __init__(self, matcher: Any, vocab_size: int, tokens: int, speed: GrammarSpeed | None = None):
        self._matcher, self.speed = matcher, speed or GrammarSpeed()
        self._bits = np.zeros((tokens + 31) // 32, dtype=np.uint32)
        self._forbidden: Tensor | None = None  # the mask of the present state, if computed
        self.vocab_size, self._tokens = vocab_size, tokens

    def copy(self) -> Grammar:
        """A copy in the same state."""
        other = Grammar(self._matcher.deep_copy(), self.vocab_size, self._tokens, self.speed)
        other._forbidden = self._forbidden
        return other

    @property
    def finished(self) -> bool:
        """Whether only an end-of-sequence token may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """The error, in one line, after which no token can follow. llguidance reports errors only when asked."""
        if not self._matcher.is_error():
            return None
        lines = str(self._matcher.get_error()).strip().splitlines() or ["it is too complex"]
        if lines[0] == "NoExtensionBias":
            return "no token fits it."
        return lines[0][:200].rstrip(".") + "."

    def forbidden(self) -> Tensor:
        """bool [vocab]: the tokens that may not come next; after an error, all. Computes the mask if `find` has not."""
        if self._forbidden is None:
            self.find()
        assert self._forbidden is not None
        return self._forbidden

    def find(self) -> None:
        """Computes the mask for `forbidden`. It may take a second, during which the interpreter's lock is free."""
        start = time.monotonic()
        self._forbidden = self._find()
        self.speed.slow |= time.monotonic() - start > SLOW

    def _find(self) -> Tensor:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return torch.ones(self.vocab_size, dtype=torch.bool)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self.vocab_size]
        return torch.from_numpy(allowed == 0)

    def accept(self, token: int) -> None:
        """Advances by a sampled token. Tokens after the end (ignore_eos) are not checked."""
        if not self.finished:
            self._matcher.consume_token(token)
            self._forbidden = None
