"""Grammars in GBNF accept what they mean: the strings of Python's regular expressions, of its JSON reader and of its parser."""

from __future__ import annotations

import ast
import json
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import pytest
from cases import cases
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from octavo.errors import InvalidRequest
from octavo.messages import MAX_GRAMMAR, StructuredOutput
from octavo.text.gbnf import is_gbnf, lark_of
from octavo.text.llguidance_grammar import serialize

JSON = r"""
# as llama.cpp has it, in several lines
root   ::= value
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
      string ":" ws value
      ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws ::= [ \t\n]*
"""
SQL = r"""
root ::= select-statement
select-statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 "
        | "table_2 "   # an alternative in a line of its own
condition ::= column "= " number
number ::= "1 " | "2 "
"""


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = bos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes()))


@cache
def compiled(grammar: str) -> LLMatcher:
    made = LLMatcher(tokenizer(), serialize(StructuredOutput("lark", grammar)), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def matcher(grammar: str) -> LLMatcher:
    return compiled(grammar).deep_copy()


def accepts(grammar: str, text: str) -> bool:
    read, ids = matcher(grammar), list(text.encode())
    return read.validate_tokens(ids) == len(ids) and read.consume_tokens(ids) and bool(read.is_accepting())


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return text[:1] not in " \t\n"


def is_sum(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return (
        re.fullmatch(r"[1+()]+", text) is not None
        and "(+" not in text
        and "++" not in text
        and text[:1] != "+"
        and "()" not in text
    )


def of_regex(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text, re.DOTALL) is not None


# A grammar, what it should accept, and the characters of the strings that are tried.
GRAMMARS: dict[str, tuple[str, Callable[[str], bool], str]] = {
    "a choice": ('root ::= "ab" | "abc" | ""', of_regex("ab|abc|"), "abc"),
    "a terminal that could take all": ('root ::= word "s"\nword ::= [a-z]+', of_regex("[a-z]+s"), "asx-"),
    "the same, recursive": ('root ::= x "ab"\nx ::= "" | x [a-b]', of_regex("[ab]*ab"), "abc"),
    "repetitions": ('root ::= a{2} b{1,} [cd]{0,2}\na ::= "x"\nb ::= "y" | "z"', of_regex("xx[yz]+[cd]{0,2}"), "xyzcd"),
    "a class's own characters": ('root ::= [a-] [\\-^] [^-c/] [.*\\]]', of_regex(r"[a\-][\-\^][^\-c/][.*\]]"), "a-^.*]c/"),
    "escapes": (r'root ::= "\x41\u00e9\n\"\\" [\u00e0-\u00ff\t] .', of_regex('A\u00e9\n"\\\\[\u00e0-\u00ff\t].'), 'Aé\n"\\\t'),
    "signs of regular expressions": (
        'root ::= "a/b(?:x)*" "|"? "{2}" | "."', of_regex(r"a/b\(\?:x\)\*\|?\{2\}|\."), "ab/(?:x)*|{2}.",
    ),
    "brackets": ('root ::= term ("+" term)*\nterm ::= "1" | "(" root ")"', is_sum, "1+()"),
    "JSON": (JSON, is_json, '{}[]":,1 a\\'),
    "SQL": (SQL, of_regex("SELECT col_[12]  from table_[12]  where col_[12] = [12] "), "SELCTcol_12 "),
}  # fmt: skip


@cases("name", GRAMMARS)
def test_a_grammar_accepts_what_it_means(name: str) -> None:
    """Random strings, random walks of the matcher, and these with a character changed."""
    grammar, expected, alphabet = GRAMMARS[name]
    draw, tried = random.Random(0), {"", *(json.dumps(value) for value in ([1, {"a": [None]}], "é\n", {"a": 1.5e3}))}
    tried |= {"".join(draw.choices(alphabet, k=draw.randint(1, 6))) for _ in range(40)}
    for _ in range(15):
        walk, text = matcher(grammar), b""
        for _ in range(60):
            if walk.is_accepting() and draw.random() < 0.4:
                break
            bias = walk.compute_logit_bias()
            allowed = [i for i in range(256) if bias[i]]
            if not (chosen := [i for i in allowed if chr(i) in alphabet] or allowed):
                break
            text += bytes([one := draw.choice(chosen)])
            walk.consume_token(one)
        whole = text.decode(errors="ignore")
        tried |= {whole, whole[:-1], whole[1:], whole.replace(alphabet[0], alphabet[-1], 1)}
    found = {text: accepts(grammar, text) for text in sorted(tried)}
    assert found == {text: expected(text) for text in found}
    assert set(found.values()) == {True, False}


def test_a_literal_is_itself() -> None:
    grammar = "root ::= " + json.dumps("é𝄞\t") + ' "\\x7f"'
    assert accepts(grammar, "é𝄞\t\x7f")
    assert accepts('root ::= "\\x7f" | "(" root ")"', "((\x7f))")


WRONG = {
    'root ::= "a" (= "b")': "lookahead assertions, '(= ...)', are not served",
    "root ::= x": "it has no rule 'x'",
    'x ::= "a"': "it has no rule 'root'",
    'root ::= "a': "it ends within a string",
    "root ::= [a\\]": "it ends within brackets",
    'root ::= "a\\': "it ends within a string",
    'root ::= "\\q"': r"it has the escape '\q', which GBNF does not have",
    'root ::= "\\ud83d"': r"its escape \ud83d is no character",
    'root ::= "a"\nroot ::= "b"': "it defines a rule twice",
    'root ::= ("a"': "Expected ')'",
    'root ::= TagDispatch(("a", b))': "Expected ')'",
}


@cases("grammar", WRONG)
def test_what_is_not_read_is_said(grammar: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        serialize(StructuredOutput("lark", grammar, "guided_grammar"))
    said = str(raised.value)
    assert said.startswith("guided_grammar cannot be followed: read as GBNF, which has '::=', ")
    assert WRONG[grammar] in said
    assert said.endswith(".")
    with pytest.raises(InvalidRequest, match=r"read as Lark \('start: ...'; GBNF is 'root ::= ...'\), "):
        serialize(StructuredOutput("lark", "start: /a", "guided_grammar"))


def test_rules_that_repeat_each_other_stay_small() -> None:
    """Written out as one regular expression this would be 2^40 characters."""
    rules = "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40))
    assert lark_of(f'root ::= r36 | "b"\n{rules}\nr40 ::= "a"').count("\n") == 1
    made = lark_of(f'root ::= r0\n{rules}\nr40 ::= "a"')
    assert (made.count("\n"), len(made) < 2000) == (42, True)
    assert accepts(f'root ::= r21 | "b"\n{rules}\nr40 ::= "a"', "b")
    with pytest.raises(ValueError, match="over 65536 characters, the most that is read"):
        lark_of("root ::= " + '"a" ' * 20_000)


def test_alternatives_that_repeat_a_rule_stay_small() -> None:
    """Written out as one regular expression this would be 300 MB."""
    made = lark_of("root ::= " + " | ".join(["long"] * 5_000) + '\nlong ::= "' + "a" * 14_000 + '"')
    assert len(made) < 2**17


# Each took tens of seconds or more, all of them with the interpreter's lock.
LONG = {
    "line ends": "\n" * MAX_GRAMMAR,
    "classes that are not closed": "root ::= " + "[" * 60_000,
    "strings that are not closed": "root ::= " + '"\\' * 30_000,
    "a chain of rules": "\n".join(f"r{n} ::= r{n + 1}" for n in range(4_000)).replace("r0", "root", 1) + '\nr4000 ::= "a"',
}


@cases("name", LONG)
def test_long_grammars_take_linear_time(name: str) -> None:
    began = time.process_time()
    if is_gbnf(LONG[name]):
        with suppress(ValueError, RecursionError):
            lark_of(LONG[name])
    assert time.process_time() - began < 4
