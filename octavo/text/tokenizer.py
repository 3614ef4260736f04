"""The checkpoint's tokenizer. It uses the `tokenizers` library directly: importing transformers would take two seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from octavo.errors import InvalidRequest, OctavoError
from octavo.files import check_directory, check_regular
from octavo.text.byte_alphabet import BYTE_OF
from octavo.text.checkpoint_text import chat_templates, no_tokenizer
from octavo.text.generation_config import Generation, read_json
from octavo.text.tiktoken_model import is_kimis, read_kimis

__all__ = ["Tokenizer", "load_tokenizer", "read_tokenizer"]

CHARACTERS_PER_TOKEN = 8  # above the average of text in any language
PIECE = 2**16  # characters
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A checkpoint's tokenizer, special tokens and chat templates.

    generation: where its ends and the default sampling are said (default: in the same directory). Raises OctavoError if the
    directory holds no readable tokenizer.
    """

    def __init__(self, directory: str | Path, generation: Generation | None = None):
        self.directory = Path(directory)
        self._tokenizer = read_tokenizer(self.directory)
        config = read_json(self.directory / "tokenizer_config.json")
        self.special_tokens = _special_tokens(read_json(self.directory / "special_tokens_map.json") | config)
        self.chat_templates = chat_templates(self.directory, config)
        self.bos_token_id = self.token_id(self.special_tokens.get("bos_token"))
        eos = self.token_id(self.special_tokens.get("eos_token"))
        generation = generation or Generation.of(directory)
        self.eos_token_ids = generation.eos_token_ids() | ({eos} if eos is not None else set())
        self.default_sampling = generation.sampling()
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(self._tokenizer.get_vocab_size(), max(added, default=-1) + 1)
        self._bytes: dict[int, bytes] = {}
        self._decoders = _decoder_types(self._tokenizer.decoder)
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor_text = self._tokenizer.decode(self._anchor, skip_special_tokens=False)

    @property
    def chat_template(self) -> str | None:
        """The default chat template; None if the checkpoint has none."""
        return self.template_for(tools=False)

    def template_for(self, tools: bool) -> str | None:
        """The chat template; with `tools`, the checkpoint's separate one for tools if it has one."""
        names = ("tool_use", "default") if tools else ("default",)
        return next((self.chat_templates[name] for name in names if name in self.chat_templates), None)

    def info(self) -> dict[str, Any]:
        """tokenizer_config.json, with special tokens as strings and the chat template, as vLLM's /tokenizer_info gives it."""
        config = read_json(self.directory / "tokenizer_config.json")
        known = {"tokenizer_class": config.get("tokenizer_class", type(self).__name__), "chat_template": self.chat_template}
        return {**config, **self.special_tokens, **known}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. Pass add_special_tokens=False for a rendered chat template, which has its special tokens.

        Only tokenizer.json decides which special tokens are added, as in transformers 5. add_bos_token in
        tokenizer_config.json is older, and contradicts it in files that were saved again.
        """
        return self._encode(text, add_special_tokens)

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether `text` is far longer than `limit` tokens, without encoding more than about twice that many.

        Text of up to CHARACTERS_PER_TOKEN per token returns False: its exact length is cheap to compute. Longer text is encoded
        in pieces until they have 2 * limit tokens; splitting adds a few tokens per piece, fewer than a piece has.
        """
        if len(text) <= CHARACTERS_PER_TOKEN * limit:
            return False
        found = 0
        for start in range(0, len(text), PIECE):
            found += len(self._encode(text[start : start + PIECE], False))
            if found > 2 * limit:
                return True
        return False

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Uses encode_batch_fast: the batch functions release the interpreter's lock, which `encode` holds, and the fast one
        skips the offsets, which nobody reads."""
        try:
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeError) as error:  # JSON may contain half of a surrogate pair
            raise InvalidRequest("The prompt is not valid Unicode text.", "prompt") from error
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        if self._decoders == {"ByteLevel"}:  # the library would decode an added token's letters as bytes
            skipped = self.special_ids if skip_special_tokens else frozenset[int]()
            return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", "replace")
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str | None) -> int | None:
        """The id of a token by its spelling in the vocabulary; None if unknown."""
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    def piece(self, token_id: int) -> str:
        """The spelling of a token in the vocabulary; "" for an unknown id."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """A token's text. Part of a character reads as U+FFFD: see token_bytes."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds when it is not the first one; possibly part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id, self.piece(token_id))
        return known

    def _bytes_of(self, token_id: int, piece: str) -> bytes:
        if token_id in self._added and "ByteLevel" in self._decoders:
            return self._added[token_id].encode()  # added tokens are plain text, even in letters of the byte alphabet
        if "ByteLevel" in self._decoders:
            try:
                return bytes(BYTE_OF[character] for character in piece)
            except KeyError:  # not byte-level; the library also reads it as plain text
                return piece.encode()
        if "ByteFallback" in self._decoders and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        # Other decoders treat the first token specially (they strip its space), so decode it after another one.
        text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text).encode()


def load_tokenizer(directory: str | Path, generation: Generation | None = None) -> Tokenizer | None:
    """The tokenizer; None if there is none, since the engine also serves token ids."""
    return None if no_tokenizer(directory) else Tokenizer(directory, generation)


def read_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer, from tokenizer.json or Kimi's file. Raises OctavoError if neither exists or can be read."""
    path = directory / "tokenizer.json"
    if not path.exists():
        if not directory.is_dir():
            check_directory(directory)  # raises a more precise error
        if is_kimis(directory):
            return read_kimis(directory)
        raise OctavoError(f"{directory} has no tokenizer.json; add one, or send prompts as token ids.")
    check_regular(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises plain Exception, and a BaseException of its own where it panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise OctavoError(f"{path} cannot be read as a tokenizer: {error}.") from error
    tokenizer.no_truncation()  # some files keep settings of their training run
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> text. The files hold strings or objects with a `content`."""
    extra = config.get("extra_special_tokens")  # newer location of model-specific tokens, such as image_token
    found = {}
    for name, value in {**(extra if isinstance(extra, dict) else {}), **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _decoder_types(decoder: Any) -> set[str]:
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}
