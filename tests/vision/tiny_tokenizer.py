"""A tokenizer of the tiny models of text and images."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = {"<|image_pad|>": 250, "<|video_pad|>": 251, "<|vision_start|>": 252, "<|vision_end|>": 253}


def write_tokenizer(directory: Path) -> None:
    """A token a byte, and those of images and videos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:246]
    made = Tokenizer(models.BPE({char: number + 4 for number, char in enumerate(alphabet)} | SPECIAL, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    made.save(str(directory / "tokenizer.json"))
