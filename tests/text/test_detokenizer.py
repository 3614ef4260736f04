"""Text that grows token by token is the text of the whole, and stop strings cut it where they should."""

import random
import time

import pytest
import tokenizers
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.demo import MODEL_DIR
from octavo.frontend.outputs import OutputProcessor
from octavo.messages import EngineRequest, Logprob, SamplingParams, TokenOutput
from octavo.text.detokenizer import Detokenizer, read_prompt
from octavo.text.tokenizer import Tokenizer

LIBRARY = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))  # the text of tokens, by who wrote them
TEXT = "Grüße an 世界 👩‍👩‍👧! def f(self): return 'né' 🇩🇪 \U0001d518"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MODEL_DIR)


def run(tokenizer, ids, prompt=(), **params):
    """The pieces of text, the tokens that were used and the stop string."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=None, **params), prompt)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.step(token_id))
        if detokenizer.stopped:
            return pieces, detokenizer.stopped
    return [*pieces, detokenizer.finish()], detokenizer.stopped


def test_no_half_characters(tokenizer):
    pieces, _ = run(tokenizer, tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT
    assert "" in pieces[:-1], "the text should split characters over tokens"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_read_as_the_whole(tokenizer, skip):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 50) for _ in range(rng.randrange(1, 40))]
        text = "".join(run(tokenizer, ids, skip_special_tokens=skip)[0])
        assert text == LIBRARY.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text


def test_random_bytes_read_as_the_whole(tokenizer):
    rng = random.Random(1)
    byte_tokens = [
        i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1 and i not in tokenizer.special_ids
    ]
    for _ in range(300):
        ids = [rng.choice(byte_tokens) for _ in range(rng.randrange(1, 60))]
        assert "".join(run(tokenizer, ids)[0]) == LIBRARY.decode(ids)


def test_a_prompt_may_end_inside_a_character(tokenizer):
    ids = tokenizer.encode("👍")
    assert len(ids) > 1
    assert "".join(run(tokenizer, ids[1:], prompt=ids[:1])[0]) == "👍"
    assert "".join(run(tokenizer, tokenizer.encode("x"), prompt=tokenizer.encode("abc"))[0]) == "x"


def test_the_prompt_s_half_of_a_character_is_not_shown(tokenizer):
    """What the model makes of it is: the whole character, or nothing but its own text."""
    ids = tokenizer.encode("Hello 🌶")
    for cut in range(1, 4):
        half = ids[:-cut]
        assert "".join(run(tokenizer, tokenizer.encode(" a"), prompt=half)[0]) == " a"
        assert "".join(run(tokenizer, [0], prompt=half)[0]) == ""
        assert "".join(run(tokenizer, [], prompt=half)[0]) == ""
        assert "".join(run(tokenizer, ids[-cut:], prompt=half)[0]).endswith("🌶")
    replacement = tokenizer.encode("\ufffd")
    assert len(replacement) > 1
    assert "".join(run(tokenizer, replacement[1:], prompt=replacement[:1])[0]) == "\ufffd"


def test_where_a_prompt_s_tokens_begin(tokenizer):
    ids = tokenizer.encode(TEXT)
    text, offsets = read_prompt(tokenizer, ids, TEXT)
    assert text == TEXT
    assert offsets == [len(LIBRARY.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
    assert read_prompt(tokenizer, [0, *ids], TEXT) == (TEXT, [0, *offsets])  # a BOS is not in what was given
    assert read_prompt(tokenizer, [0, *ids]) == (TEXT, [0, *offsets])
    assert read_prompt(tokenizer, tokenizer.encode("Hello 🌶")[:-1])[0] == "Hello "


def letters(tokenizer, text):
    """One token a byte."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


@cases(
    ("text", "stop", "include", "shown", "reason"),
    [
        ("one END two", "END", False, "one ", "END"),
        ("one END two", "END", True, "one END", "END"),
        ("EEENEND two", "END", False, "EEEN", "END"),
        ("aab aabaaaab", "aaaa", False, "aab aab", "aaaa"),
        ("never EN", "END", False, "never EN", None),
        ("xabcd", ("bc", "abcd"), False, "xa", "bc"),
        ("xabc", ("c", "bc"), False, "xa", "bc"),
        ("grü世界!", "界", True, "grü世界", "界"),
    ],
)
@cases("split", [True, False])
def test_stop_strings(tokenizer, text, stop, include, shown, reason, split):
    ids = letters(tokenizer, text) if split else tokenizer.encode(text)
    pieces, stopped = run(tokenizer, ids, stop=stop, include_stop_str_in_output=include)
    assert stopped == reason
    assert "".join(pieces) == shown


def test_the_start_of_a_stop_string_is_held_back(tokenizer):
    pieces, _ = run(tokenizer, letters(tokenizer, "aENxEND"), stop="END")
    assert pieces == ["a", "", "", "ENx", "", "", ""]


@cases(("least", "shown"), [(0, ""), (2, ""), (3, "abc"), (5, "abc"), (6, "abcabc!")])
def test_no_stop_string_within_min_tokens(tokenizer, least, shown):
    assert "".join(run(tokenizer, letters(tokenizer, "abcabc!"), stop="abc", min_tokens=least)[0]) == shown


def test_cost_is_linear(tokenizer):
    continuation = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x80")

    def seconds(count):
        start = time.process_time()
        run(tokenizer, [continuation] * count, stop=["\ufffd" * 8 + "x", "end"])
        return time.process_time() - start

    seconds(100)
    few = min(seconds(5_000) for _ in range(3))
    assert seconds(40_000) < 30 * few  # eight times as many; a decoder with a window would need 64 times as long


def process(tokenizer, steps, **params):
    processor = OutputProcessor(EngineRequest("r", [5], SamplingParams(**params)), tokenizer)
    return [processor.process(step) for step in steps]


def test_a_stop_string_cuts_tokens_and_logprobs(tokenizer):
    ids = letters(tokenizer, "abSTcd")
    logprobs = [(Logprob(i, -1.0, 1),) for i in ids]
    (delta,) = process(tokenizer, [TokenOutput("r", ids, logprobs=logprobs)], stop="ST")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", "ST")
    assert (delta.token_ids, delta.logprobs) == (ids[:4], logprobs[:4])


def test_the_token_that_ends_is_not_shown(tokenizer):
    a, b = letters(tokenizer, "ab")
    ended = [TokenOutput("r", [a]), TokenOutput("r", [b], "stop", b)]
    assert [d.text for d in process(tokenizer, ended)] == ["a", ""]
    assert [d.text for d in process(tokenizer, ended, include_stop_str_in_output=True)] == ["a", "b"]
    assert [d.text for d in process(tokenizer, [TokenOutput("r", [a, b], "length")])] == ["ab"]


def test_what_is_held_comes_with_the_end(tokenizer):
    e, n, half = *letters(tokenizer, "EN"), letters(tokenizer, "é")[0]
    steps = [TokenOutput("r", [e]), TokenOutput("r", [n, half], "length")]
    assert [d.text for d in process(tokenizer, steps, stop="END")] == ["", "EN\ufffd"]


def test_without_text(tokenizer):
    ids = letters(tokenizer, "ab")
    assert process(None, [TokenOutput("r", ids)])[0].text == ""
    assert process(tokenizer, [TokenOutput("r", ids)], detokenize=False)[0].token_ids == ids


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc", max_size=24),
    st.booleans(),
    st.integers(0, 6),
)
def test_stop_strings_against_a_search_of_the_whole_text(tokenizer, stops, text, include, least):
    """The match that is complete first, of those the longest; one that is complete within min_tokens is none."""
    pieces, stopped = run(tokenizer, letters(tokenizer, text), stop=stops, include_stop_str_in_output=include, min_tokens=least)
    ends = ((end, len(stop)) for end in range(least + 1, len(text) + 1) for stop in stops if text[:end].endswith(stop))
    found = min(ends, key=lambda match: (match[0], -match[1]), default=None)
    if found is None:
        assert ("".join(pieces), stopped) == (text, None)
    else:
        end, length = found
        assert ("".join(pieces), stopped) == (text[: end if include else end - length], text[end - length : end])
