"""Structured output: which tokens may come next, by llguidance."""

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

__all__ = ["Grammar", "GrammarCompiler", "Pace"]


# Items are what alternatives become: 2,000 tools need more than the library's 2,000, and take milliseconds a step.
LIMITS: dict[str, Any] = {"max_items_in_row": 10_000, "step_max_items": 100_000, "verbose_errors": False}
SLOW = 0.02  # seconds to find the next tokens in; most grammars take a thousandth of it


class GrammarCompiler:
    """Makes a Grammar a request; reads the tokenizer when the first one asks."""

    def __init__(self, directory: Path, vocab_size: int):
        self.directory, self.vocab_size = directory, vocab_size
        self._tokenizers: dict[frozenset[int], Any] = {}

    def compile(self, grammar: str, eos_token_ids: frozenset[int]) -> Grammar:
        """`grammar` is llguidance's own text. Raises InvalidRequest if it does not compile with this vocabulary."""
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if eos_token_ids not in self._tokenizers:
            if no_tokenizer(self.directory):
                raise OctavoError(f"structured output needs a tokenizer, and {self.directory} has no tokenizer.json.")
            definition = read_tokenizer(self.directory).to_str()
            self._tokenizers[eos_token_ids] = LLTokenizer(
                definition, n_vocab=self.vocab_size, eos_token=sorted(eos_token_ids) or None
            )
        matcher = LLMatcher(self._tokenizers[eos_token_ids], grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise InvalidRequest(
                f"the grammar of the structured output does not compile: {matcher.get_error()}", "response_format"
            )
        return Grammar(matcher, self.vocab_size)


@dataclass(slots=True)
class Pace:
    """How the n sequences of a request got on with their grammar."""

    slow: bool = False  # finding the next tokens once took over SLOW seconds


class Grammar:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, pace: Pace | None = None):
        self._matcher, self.pace = matcher, pace or Pace()
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        self._forbidden: Tensor | None = None  # found, and still true
        self.vocab_size = vocab_size

    def copy(self) -> Grammar:
        """Another one that stands where this one does."""
        other = Grammar(self._matcher.deep_copy(), self.vocab_size, self.pace)
        other._forbidden = self._forbidden
        return other

    @property
    def finished(self) -> bool:
        """Whether nothing but an end-of-sequence token may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """In one line why nothing can follow any more: the engine of grammars gave up, and says so only when it is asked."""
        if not self._matcher.is_error():
            return None
        lines = str(self._matcher.get_error()).strip().splitlines() or ["it is too complex"]
        return lines[0][:200].rstrip(".") + "."

    def forbidden(self) -> Tensor:
        """bool [vocab]: the tokens that may not come next; all of them after an error. They are found now if they were not."""
        if self._forbidden is None:
            self.find()
        assert self._forbidden is not None
        return self._forbidden

    def find(self) -> None:
        """Finds what `forbidden` tells, which may take a second; other threads can go on meanwhile."""
        start = time.monotonic()
        self._forbidden = self._find()
        self.pace.slow |= time.monotonic() - start > SLOW

    def _find(self) -> Tensor:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return torch.ones(self.vocab_size, dtype=torch.bool)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self.vocab_size]
        return torch.from_numpy(allowed == 0)

    def accept(self, token: int) -> None:
        """The token was chosen. What follows the end (ignore_eos) is not looked at."""
        if not self.finished:
            self._matcher.consume_token(token)
            self._forbidden = None
