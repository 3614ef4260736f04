"""The demo model's text: this Python's standard library, as documents and as chats.

Only `scripts/train_demo.py` uses this module; serving the demo model does not.
"""

import ast
import hashlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HELDOUT = ["bisect", "cmd", "fnmatch", "fractions", "graphlib", "heapq", "netrc", "queue", "sched", "shlex", "textwrap"]
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A line break keeps the indentation after it, so that "\n        " can become one token;
# underscores stay inside words because identifiers are the words of this corpus.
WORDS = Regex(r"(?:\r?\n)+[ \t]*| ?[\p{L}\p{M}_]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}_]+| +(?= \S)|\s+")

CARD = """\
---
license: psf-2.0
language: [en]
tags: [llama, code, python]
---

# Octavo's demo model

A {kind} of {params:.2f} M parameters (6 layers, width 256, 4 query and 2 key/value heads,
vocabulary 4096, context 1024, tied embeddings) that continues Python as the standard library
writes it.  It exists so that a server can be tried, tested and measured with a real model and
no download.  Its code looks right more often than it is right: do not use it for anything else.

| | |
|---|---|
| Held-out perplexity | **{ppl:.3f} per token** (loss {loss:.4f}), **{bits:.4f} bits per byte** |
| Last training loss | {train_loss:.4f} per token (running mean over about 50 steps) |
| Training | {tokens:.2f} M tokens, {steps:.0f} steps, {minutes:g} minutes, seed {seed} |
| Machine | {machine}; {arithmetic} arithmetic |
| Weights | BF16, rounded once at the end |

The perplexity is that of the rounded weights, computed in FP32, on `heldout.txt` ({kib:.0f} KiB):
the text is one token sequence cut into consecutive windows of 512 without overlap; each window
starts with an empty context and predicts the token after each of its 512 positions, so that
every token but the very first counts once.  Bits per byte divide the same total by the UTF-8
length of the text.

## Data

All of it comes from CPython {python}: the standard library's sources without generated tables,
a random quarter of its tests in each epoch, the topics of `help()`, and chats in ChatML form
that a script derives from the documented functions and the topics (18 % of the tokens).
These modules and their tests were left out and make up `heldout.txt`: {heldout}.

Code and documentation are copyright of the Python Software Foundation and used under its
licence (`LICENSE-PSF.txt`).

## Reproduction

    python scripts/train_demo.py --minutes {minutes:g} --rows {rows} --seed {seed} --output octavo/demo/model

The learning rate follows the clock, so that a run always ends in time; a faster machine sees
more tokens and reaches a lower loss, and no two runs agree to the bit.  The matrices inside the
layers are trained with Muon (orthogonalized momentum), the rest with AdamW.  Sequences are 512
tokens long, and 1024 for the last 15 % of the time.

## Greedy samples

{samples}
"""


def read_library(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Return (library files, test files, held-out files), each a list of source texts."""
    library: list[str] = []
    tests: list[str] = []
    heldout: list[str] = []
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # _sysconfigdata describes one machine's build, and topics.py is read as prose.
        if "site-packages" in parts or re.match("_sysconfigdata|topics", path.name):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        lines = text.count("\n") + 1
        # Tables of code points and other machine-made data teach a small model nothing.
        numeric = len(re.findall(r"\\x|0x", text)) > lines or "decoding_table" in text
        tabular = len(text) > 2000 and (numeric or len(text) > 75 * lines)
        if tabular or digest in seen or not 200 < len(text) < 400_000:
            continue
        seen.add(digest)
        if len(parts) == 1 and path.stem in HELDOUT:
            heldout.append(text)
        elif path.stem.removeprefix("test_") in HELDOUT:
            continue
        elif {"test", "tests", "idle_test"} & set(parts[:-1]):
            tests.append(text)
        else:
            library.append(text)
    return library, tests, heldout


def chat(turns: list[tuple[str, str]], rng: Random) -> str:
    """Render (question, answer) pairs the way CHAT_TEMPLATE does."""
    messages = [m for q, a in turns for m in (("user", q), ("assistant", a))]
    if rng.random() < 0.25:
        messages.insert(0, ("system", "You are a helpful assistant."))
    return "".join(f"{START}{role}\n{content}{STOP}\n" for role, content in messages)


def questions(source: str, rng: Random) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) pairs about the documented functions of one source file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
        lines = textwrap.dedent("\n".join(lines)).split("\n")
        summary = " ".join(doc.split("\n\n")[0].split())
        if len(lines) > 60 or not 10 < len(summary) < 200:
            continue
        body = max(1, node.body[0].lineno - node.lineno)
        code, head = "\n".join(lines), "\n".join(lines[:body])
        kind = rng.random()
        if kind < 0.5:
            ask = rng.choice(["Write a Python function: ", "Write a function in Python. "])
            yield ask + summary, f"```python\n{code}\n```"
        elif kind < 0.8:
            yield f"Complete this code:\n```python\n{head}\n```", f"```python\n{code}\n```"
        else:
            ask = rng.choice(["What does `{}` do?", "Explain the function `{}`."])
            yield ask.format(node.name), doc


def chat_documents(sources: list[str], rng: Random) -> list[str]:
    """Return chat documents of one or two turns made from code and from help() topics."""
    pairs = [pair for source in sources for pair in questions(source, rng)]
    for name, text in topics.items():
        # Whole topics run to many pages: the opening paragraphs answer the question.
        title = re.match(r"(.+)\n\*+\n", text)
        opening = text[title.end() if title else 0 :].strip()[:1200].rpartition("\n\n")[0]
        if opening:
            subject = title[1].lower().replace('"', "`") if title else f"`{name}`"
            for ask in "Explain {} in Python.", "What is {}?":
                pairs.append((ask.format(subject), opening))
    rng.shuffle(pairs)
    documents = []
    while pairs:
        turns = 2 if rng.random() < 0.15 and len(pairs) > 1 else 1
        documents.append(chat([pairs.pop() for _ in range(turns)], rng))
    return documents


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with END, START and STOP as tokens 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Windows:
    """Endless batches of token windows; every epoch reshuffles and redraws the tests."""

    def __init__(self, tokenizer: Tokenizer, always: list[str], sometimes: list[str], rng: Random, share: float = 0.25) -> None:
        self.always, self.sometimes = (
            [np.array([*encoding.ids, 0], np.uint16) for encoding in tokenizer.encode_batch(texts)]
            for texts in (always, sometimes)
        )
        self.rng, self.share = rng, share
        self.noise = np.random.default_rng(rng.getrandbits(32))
        # For each token that is a space and a word: the token of the word alone, otherwise 0.
        self.space = tokenizer.token_to_id("Ġ")
        tokens = map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))
        self.words = np.array([(t[:1] == "Ġ" and tokenizer.token_to_id(t[1:])) or 0 for t in tokens], np.uint16)
        self.sizes = [sum(map(len, group)) for group in (self.always, self.sometimes)]
        self.starts: list[int] = []
        self.length = 0

    def loosen(self, stream: np.ndarray, share: float = 0.03) -> np.ndarray:
        """Split some tokens " word" into " " and "word", because prompts may end in a space."""
        split = (self.words[stream] > 0) & (self.noise.random(len(stream)) < share)
        first = np.flatnonzero(split) + np.arange(split.sum())
        loose = np.repeat(stream, 1 + split)
        loose[first], loose[first + 1] = self.space, self.words[stream[split]]
        return loose

    def batch(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of shape (rows, length)."""
        if len(self.starts) < rows or length != self.length:
            picked = self.always + self.rng.sample(self.sometimes, int(self.share * len(self.sometimes)))
            self.rng.shuffle(picked)
            self.stream, self.length = self.loosen(np.concatenate(picked)), length
            # A new offset cuts the same documents elsewhere in every epoch.
            self.starts = list(range(self.rng.randrange(length), len(self.stream) - length - 1, length))
            self.rng.shuffle(self.starts)
        starts = [self.starts.pop() for _ in range(rows)]
        block = np.stack([self.stream[s : s + length + 1] for s in starts]).astype(np.int64)
        return block[:, :-1], block[:, 1:]
