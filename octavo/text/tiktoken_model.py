"""Kimi's tokenizer, whose checkpoints have `tiktoken.model` and a program to read it, but no tokenizer.json.

The file has a line per token: its bytes in base64, then its rank, which is its id. tiktoken repeatedly merges the adjacent pair
whose concatenation is the token of the lowest rank. The merges for the `tokenizers` library are therefore all splits of a token
into two tokens, ordered by rank. Where two overlapping pairs form the same token, tiktoken merges the left one, and the library
may merge the right one. Ids after the last rank are special tokens, named in tokenizer_config.json.
Source: tokenization_kimi.py of moonshotai/Kimi-K2-Instruct, which has this pattern.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from octavo.errors import OctavoError
from octavo.files import read_json, read_text
from octavo.text.byte_alphabet import LETTER_OF

__all__ = ["is_kimis", "read_kimis"]

RESERVED = 258  # ids after the last rank; those without a name are <|reserved_token_N|>
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def is_kimis(directory: Path) -> bool:
    """Whether a checkpoint has this tokenizer. Other models' tiktoken.model files need other patterns."""
    if not (directory / "tiktoken.model").exists():
        return False
    config = read_json(directory / "tokenizer_config.json") or {}
    return config.get("tokenizer_class") == "TikTokenTokenizer"


def read_kimis(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer. Raises OctavoError where a line is not a token and its rank, or ranks are missing."""
    path = directory / "tiktoken.model"
    ranks = _ranks(path, read_text(path) or "")
    spelled = {token: "".join(map(LETTER_OF.__getitem__, token)) for token in ranks}
    merges = [
        (spelled[left], spelled[right])
        for token in ranks  # ordered by rank
        for at in range(1, len(token))
        if (left := token[:at]) in ranks and (right := token[at:]) in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_tokens(_named(directory, len(ranks)))
    return made


def _ranks(path: Path, text: str) -> dict[bytes, int]:
    """Token -> rank, ordered by rank."""
    found: list[tuple[int, bytes]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                spelling, rank = line.split()
                found.append((int(rank), base64.b64decode(spelling, validate=True)))
        except (ValueError, binascii.Error):
            raise OctavoError(f"{path}, line {number} is not a token in base64 and its rank; download it again.") from None
    found.sort()
    ranks = {token: rank for rank, token in found}
    if [rank for rank, _ in found] != list(range(len(found))) or len(ranks) != len(found) or not all(ranks):
        raise OctavoError(f"{path} does not give each rank from 0 on to one token; download it again.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise OctavoError(f"{path} has no token for the byte {missing[0]}; download it again.")
    return ranks


def _named(directory: Path, first: int) -> list[AddedToken]:
    """The special tokens, with ids from `first` on."""
    config: dict[str, Any] = read_json(directory / "tokenizer_config.json") or {}
    given = config.get("added_tokens_decoder")
    entries = given if isinstance(given, dict) else {}
    named = []
    for number in range(first, first + RESERVED):
        entry = entries.get(str(number))
        entry = entry if isinstance(entry, dict) else {}
        content = entry.get("content")
        text = content if isinstance(content, str) and content else f"<|reserved_token_{number}|>"
        named.append(AddedToken(text, normalized=False, special=entry.get("special") is not False))
    return named
