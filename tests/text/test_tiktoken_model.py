"""Kimi's tokenizer against tiktoken itself, on a vocabulary that the tests train."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tiktoken.load import load_tiktoken_bpe
from tokenizers import models, pre_tokenizers, trainers

from octavo.errors import OctavoError
from octavo.text.byte_alphabet import BYTE_OF
from octavo.text.checkpoint_text import no_tokenizer
from octavo.text.tiktoken_model import PATTERN
from octavo.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hello world, it's 12345 o'clock!\n\n  I'LL go\tto the  STORE  \r\n x", "naïve café ÀÉÎ ß ǅ ʰ",
    "你好，世界 hello世界abc漢字",
    "मनीष की किताब",
    "👩‍👩‍👧 🎉🎉", "   ", "", "def f(x):\n    return x ** 2  # x²\n", "aaaaaaaaaaaaaaaa abababab",
    "日本語のテキスト、カタカナ", "ＡＢＣ１２３",
]  # fmt: skip


NAMES = ("[BOS]", "[EOS]", "<|im_end|>", "<|tool_calls_section_begin|>")


def write(directory: Path, size: int = 900, named: Sequence[str] = NAMES) -> list[str]:
    """A checkpoint's files, its vocabulary trained on the texts; its special tokens, of which those of calls and thinking are
    text.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(TEXTS * 20, trainer)
    vocab = sorted(library.get_vocab().items(), key=lambda item: item[1])
    ranked = [bytes(BYTE_OF[c] for c in piece) for piece, _ in vocab]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranked)]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    names = list(named)
    text = ("<|tool", "<think", "</think")
    added = {str(len(ranked) + i): {"content": name, "special": not name.startswith(text)} for i, name in enumerate(names)}
    config = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return names


def test_ids_and_text_are_tiktokens(tmp_path: Path) -> None:
    names = write(tmp_path)
    ranks = load_tiktoken_bpe(str(tmp_path / "tiktoken.model"))
    special = {names[i] if i < len(names) else f"<|reserved_token_{len(ranks) + i}|>": len(ranks) + i for i in range(258)}
    theirs = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    assert no_tokenizer(tmp_path) is None
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    assert ours.vocab_size == theirs.n_vocab
    rng = random.Random(0)
    pieces = [*TEXTS, *names, "<|reserved_token_", " ", "\n", "'s", "'LL", "é", "\u0301", "世", "\U0001f389"]
    for text in [*TEXTS, *("".join(rng.choices(pieces, k=6)) for _ in range(300))]:
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (ours.bos_token_id, ours.eos_token_ids) == (special["[BOS]"], {special["[EOS]"]})
    assert [ours.token_bytes(i) for i in range(len(ranks))] == [theirs.decode_single_token_bytes(i) for i in range(len(ranks))]
    assert ours.decode(theirs.encode("a<|im_end|><|tool_calls_section_begin|>", allowed_special="all")) == (
        "a<|tool_calls_section_begin|>"
    )


def without_the_first(text: str) -> str:
    return "\n".join(f"{line.split()[0]} {rank}" for rank, line in enumerate(text.splitlines()[1:]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text + "no base64\n", r"line \d+ is not a token"),
        (lambda text: text.replace(" 300\n", " 1300\n"), "each rank from 0 on"),
        (without_the_first, "no token for the byte"),
    ],
)  # fmt: skip
def test_files_that_are_none(change, told, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "tiktoken.model"
    path.write_text(change(path.read_text()))
    with pytest.raises(OctavoError, match=told):
        Tokenizer(tmp_path)


def test_files_of_others_are_not_taken_for_kimis(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "OtherTokenizer"}')
    assert "tiktoken.model with transformers" in str(no_tokenizer(tmp_path))
    assert load_tokenizer(tmp_path) is None
