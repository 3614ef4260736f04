"""Reads GBNF, the EBNF of llama.cpp and XGrammar (`root ::= "yes" | "no"`), as a grammar of llguidance's.

llguidance parses it, and its own converter would make a terminal of every rule that it can. A terminal takes as many characters
as it matches, so that `root ::= word "s"` with `word ::= [a-z]+` could never end. Here a grammar without recursion becomes one
regular expression, and in any other every terminal is one character: both accept what GBNF means. The latter takes longer, 7 ms
a token for JSON's grammar and a vocabulary of 131,072 (2 cores, x86-64).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

__all__ = ["is_gbnf", "lark_of"]

_RULE = re.compile(r"(?m)^[^\S\n]*+[\w-]++\s*+::=")  # possessive, since a client may send half a million line ends
_NEXT_RULE = re.compile(r"[\w-]+\s*::=")
# A string or a class that is not closed takes all that follows: looking for each one's end again would take quadratic time.
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*+("?)|\[(?:\\.|[^\]\\])*+(\]?)|#[^\n]*|\(=|\s+|[\w-]+|.', re.DOTALL)
_HEX = "[0-9a-fA-F]"
_CHARACTER = re.compile(  # a pair of UTF-16 is how JSON's writers escape what is beyond 0xFFFF
    rf"\\u(?P<high>[dD][89abAB]{_HEX}{{2}})\\u(?P<low>[dD][c-fC-F]{_HEX}{{2}})"
    rf"|\\x(?P<x>{_HEX}{{2}})|\\u(?P<u>{_HEX}{{4}})|\\U(?P<U>{_HEX}{{8}})|\\(?P<escape>.)|(?P<plain>.)",
    re.DOTALL,
)
_HEXADECIMAL = re.compile(r"\\x(..)")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "e": "\x1b"}
_ANY = "[\\x00-\U0010ffff]"
_MOST = 1 << 16  # characters of a grammar, read in a second; and of one regular expression


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar defines rules with `::=`; Lark has a colon."""
    return _RULE.search(grammar) is not None


def lark_of(grammar: str) -> str:
    """The grammar in llguidance's dialect of Lark. Raises ValueError for one that is not GBNF, or not of the served part."""
    from llguidance import gbnf_to_lark as gbnf

    if len(grammar) > _MOST:
        raise ValueError(f"it has over {_MOST} characters, the most that is read; make it smaller")
    plain = _plain(grammar)
    try:
        rules = gbnf.GrammarParser().parse(plain)
    except gbnf.GbnfToLarkError as error:
        raise ValueError(str(error)) from None
    if len(rules) < len(re.findall(r"(?m)^[\w-]+ *::=", plain)):
        raise ValueError("it defines a rule twice")
    reached, recursive = _reached(rules)
    if not recursive:
        try:
            return f"start: /{_Regex(rules).of(rules['root'].alternatives)}/\n"
        except OverflowError:
            pass  # rules that repeat each other become long where they are written out
    names = {name: "start" if name == "root" else f"rule_{number}" for number, name in enumerate(reached)}
    return "".join(f"{names[name]}: {_by_character(rules[name].alternatives, names)}\n" for name in reached)


def _plain(grammar: str) -> str:
    """Without comments, a rule a line, and with no escapes but \\xHH, which both readers have."""
    out = []
    for token in _TOKEN.finditer(grammar):
        text = token[0]
        if text[0] in '"[' and not (token[1] or token[2]):
            raise ValueError("it ends within " + ("brackets" if text[0] == "[" else "a string"))
        if text[0] == '"':
            out.append('"' + "".join(_escaped(c, '"\\') for c in _characters(text[1:-1])) + '"')
        elif text[0] == "[":
            out.append(f"[{_class(text[1:-1])}]")
        elif text == "(=":
            raise ValueError("lookahead assertions, '(= ...)', are not served")
        elif text.isspace():
            out.append("\n" if "\n" in text and _NEXT_RULE.match(grammar, token.end()) else " ")
        elif text[0] != "#":
            out.append(_ANY if text == "." else text)
    return "".join(out).strip()


def _class(inner: str) -> str:
    """What is between brackets: a range's hyphen and the first caret are the only characters with a meaning."""
    negated, parts = inner.startswith("^"), []
    for found in _CHARACTER.finditer(inner, int(negated)):
        parts.append("-" if found["plain"] == "-" else _escaped(_character(found), "^-[]\\/&~"))
    return "^" * negated + "".join(parts)


def _characters(text: str) -> Iterator[str]:
    return map(_character, _CHARACTER.finditer(text))


def _character(found: re.Match[str]) -> str:
    if found["low"]:
        return bytes.fromhex(found["high"] + found["low"]).decode("utf-16-be")
    if code := found["x"] or found["u"] or found["U"]:
        if not 0xD800 <= int(code, 16) < 0xE000 and int(code, 16) <= 0x10FFFF:
            return chr(int(code, 16))
        raise ValueError(f"its escape {found[0]} is no character")
    if (escape := found["escape"]) is None:
        return found["plain"]
    if escape not in _ESCAPES and escape.isalnum():
        raise ValueError(f"it has the escape '\\{escape}', which GBNF does not have")
    return _ESCAPES.get(escape, escape)


def _escaped(character: str, special: str) -> str:
    return f"\\x{ord(character):02x}" if character in special or character < " " or character == "\x7f" else character


def _reached(rules: dict[str, Any]) -> tuple[list[str], bool]:
    """The rules that `root` needs, and whether any needs itself. Raises ValueError for one that is not defined."""
    below: dict[str, set[str]] = {}
    wanted = ["root"]
    while wanted:
        name = wanted.pop()
        if name not in rules:
            raise ValueError(f"it has no rule '{name}'")
        if name not in below:
            below[name] = set(_references(rules[name].alternatives))
            wanted += sorted(below[name])
    above = defaultdict[str, list[str]](list)
    for name, needed in below.items():
        for one in needed:
            above[one].append(name)
    left = {name: len(needed) for name, needed in below.items()}  # of those that a rule needs, how many may recur
    ended = [name for name, count in left.items() if not count]
    for name in ended:  # which grows meanwhile
        for user in above[name]:
            left[user] -= 1
            if not left[user]:
                ended.append(user)
    return list(below), len(ended) < len(below)


def _references(node: Any) -> Iterator[str]:
    if hasattr(node, "target"):
        yield node.name
    for child in node.children():
        yield from _references(child)


class _Regex:
    """One regular expression of rules that do not recur. A rule's is made once. Raises OverflowError for a long one."""

    def __init__(self, rules: dict[str, Any]):
        self.rules = rules
        self.made: dict[str, str] = {}

    def of(self, node: Any) -> str:
        if hasattr(node, "rx"):
            return str(node.rx)
        if hasattr(node, "value"):
            return "".join(c if c.isalnum() or c > "\x7f" else f"\\x{ord(c):02x}" for c in _value(node))
        if hasattr(node, "target"):
            if node.name not in self.made:
                self.made[node.name] = f"(?:{self.of(self.rules[node.name].alternatives)})"
            return self.made[node.name]
        if hasattr(node, "min_times"):
            return f"(?:{self.of(node.node)}){_times(node)}"
        if hasattr(node, "alternatives"):
            return f"(?:{'|'.join(self._parts(node.alternatives))})"
        return "".join(self._parts(node.nodes))

    def _parts(self, nodes: list[Any]) -> list[str]:
        parts, length = [], 0
        for node in nodes:
            parts.append(self.of(node))
            if (length := length + len(parts[-1])) > _MOST:
                raise OverflowError
        return parts


def _by_character(node: Any, names: dict[str, str]) -> str:
    """Lark of a node in which every terminal is one character."""
    if hasattr(node, "rx"):
        return f"/{node.rx}/"
    if hasattr(node, "value"):
        letters = [json.dumps(c, ensure_ascii=c == "\x7f") for c in _value(node)]
        return f"({' '.join(letters)})" if letters else '""'
    if hasattr(node, "target"):
        return names[node.name]
    if hasattr(node, "min_times"):
        return f"({_by_character(node.node, names)}){_times(node)}"
    if hasattr(node, "alternatives"):
        return f"({' | '.join(_by_character(one, names) for one in node.alternatives)})"
    return " ".join(_by_character(one, names) for one in node.nodes) or '""'


def _value(literal: Any) -> str:
    return _HEXADECIMAL.sub(lambda found: chr(int(found[1], 16)), literal.value)


def _times(node: Any) -> str:
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    last = "" if node.max_times is None else node.max_times
    return short.get((node.min_times, node.max_times), f"{{{node.min_times},{last}}}")
