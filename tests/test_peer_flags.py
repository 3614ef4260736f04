"""The table of vLLM's flags that are no settings here: each is answered as the table says, and the page shows the table."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import cases

from octavo.cli import main, make_parser
from octavo.command_words import with_dashes
from octavo.errors import OctavoError
from octavo.frontend.keywords import taken_keywords
from octavo.peer_flags import PEER_FLAGS, PeerFlag
from octavo.server import serve
from octavo.server.serve_arguments import ignored_flags

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from-vllm.md").read_text()
OTHER = "99.5"  # a value that no row says is so
CHECKED = {
    "--compilation-config": (["3", '{"level": 3}', '{"cudagraph_mode": "FULL"}', "{}"], ["0", '{"mode": 0}', "{"]),
    "--structured-outputs-config": (['{"backend": "xgrammar"}', "{}"], ['{"reasoning_parser": "qwen3"}', "[]"]),
}


IN_WORDS = {
    "--compilation-config": "all but level or mode 0 and `cudagraph_mode` NONE",
    "--structured-outputs-config": "`backend` alone",
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return make_parser("serve", serve.add_arguments)


def values(flag: PeerFlag) -> tuple[list[str], list[str]]:
    """Values that are so, and others."""
    if callable(flag.so):
        return CHECKED[flag.names[0]]
    return list(flag.so), [OTHER]


def lines(flag: PeerFlag) -> Iterator[tuple[list[str], str, bool]]:
    """Command lines of every spelling: the words, how an answer names them, and whether they are so."""
    so, others = values(flag)
    for name in flag.spellings:
        if flag.takes == "switch":
            given = "on" if name in flag.names else "off"
            yield [name], name, given in so
            continue
        for value in so:
            yield [name, value], f"{name} {value}", True
        for value in others:
            yield [name, value], f"{name} {value}", False


@cases("flag", PEER_FLAGS, ids=[flag.names[0] for flag in PEER_FLAGS])
def test_each_flag_is_answered_as_the_table_says(flag: PeerFlag, parser: argparse.ArgumentParser) -> None:
    for words, shown, so in lines(flag):
        args = parser.parse_args(with_dashes(words))
        if so:
            assert ignored_flags(args) == [], shown
        elif flag.ignored:
            assert ignored_flags(args) == [words[0]]
        else:
            with pytest.raises(OctavoError) as refused:
                ignored_flags(args)
            assert str(refused.value) == f"{shown} is not served: {flag.why}."


@cases("flag", PEER_FLAGS, ids=[flag.names[0] for flag in PEER_FLAGS])
def test_a_keyword_of_llm_gets_the_same_answer(flag: PeerFlag, caplog: pytest.LogCaptureFixture) -> None:
    name = next(name for name in flag.names if name.startswith("--"))[2:].replace("-", "_")
    so, others = values(flag)
    given: list[tuple[object, bool]] = [(None, True), *((value, True) for value in so), *((value, False) for value in others)]
    if flag.takes == "switch":
        given = [(None, True), (True, "on" in so), (False, "off" in so)]
    for value, is_so in given:
        caplog.clear()
        if is_so or flag.ignored:
            assert taken_keywords({name: value}) == {}
            assert [record.getMessage() for record in caplog.records] == [f"Taken without effect: {name}."] * (not is_so)
        else:
            with pytest.raises(OctavoError, match=re.escape(f"{name}={value!r} is not served: {flag.why}.")):
                taken_keywords({name: value})


def test_what_is_refused_is_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--enable-lora", "--max-loras", "4", "--swap-space", "4", "--task", "embed"]) == 1
    told = capsys.readouterr().err
    assert told.count(" is not served: ") == 3
    assert told.count("\n") == 1


def test_a_python_program_s_values_are_read_as_they_are() -> None:
    assert taken_keywords({"swap_space": 4, "max_model_len": 8, "disable_log_stats": True, "task": "generate"}) == {
        "max_model_len": 8
    }
    assert taken_keywords({"compilation_config": {"level": 3}, "decode_context_parallel_size": 1, "cpu_offload_gb": 0.0}) == {}
    with pytest.raises(OctavoError, match=r"^decode_context_parallel_size=2 is not served: each rank has"):
        taken_keywords({"decode_context_parallel_size": 2})
    with pytest.raises(OctavoError, match=r"^speculative_config=\{'method': 'ngram'\} is not served: there is no spec"):
        taken_keywords({"speculative_config": {"method": "ngram"}})


def row(flag: PeerFlag) -> str:
    """The flag's row in the page."""
    names = ", ".join(f"`{name}`" for name in flag.names)
    if callable(flag.so):
        so = IN_WORDS[flag.names[0]]
    elif flag.takes == "switch":
        so = ""
    else:
        so = ", ".join(f"`{value}`" for value in flag.so)
    why = flag.why[0].upper() + flag.why[1:] + "."
    return f"| {names} | {so} | {why} |" if not _is_refused(flag) else f"| {names} | {why} |"


def _is_refused(flag: PeerFlag) -> bool:
    return not flag.ignored and flag.so in ((), ("off",))


def table(kind: str) -> list[str]:
    """The rows of a table of the page."""
    chosen = {
        "ignored": [flag for flag in PEER_FLAGS if flag.ignored],
        "so": [flag for flag in PEER_FLAGS if not flag.ignored and not _is_refused(flag)],
        "refused": [flag for flag in PEER_FLAGS if _is_refused(flag)],
    }[kind]
    return list(map(row, chosen))


HEADINGS = {"so": "Values that are so already", "ignored": "Taken without effect", "refused": "Refused"}


def test_the_page_has_the_table() -> None:
    for kind, heading in HEADINGS.items():
        shown = PAGE.partition(f"### {heading}\n")[2].partition("\n#")[0]
        rows = [line for line in shown.splitlines() if line.startswith("| `")]
        assert rows == table(kind), heading
    flags = set(re.findall(r"`(-[\w-]+)`", PAGE))
    known = make_parser("serve", serve.add_arguments)._option_string_actions
    assert {flag for flag in flags if flag not in known} == set()


def test_the_page_names_every_flag_of_serve(parser: argparse.ArgumentParser) -> None:
    own = {flag for flag, action in parser._option_string_actions.items() if action.dest not in ("peers", "help")}
    assert sorted(flag for flag in own if flag.startswith("--") and "--no-" not in flag and f"`{flag}" not in PAGE) == []
    for heading in ("### The same meaning", "### Different", "## Only here"):
        named = re.findall(r"`(--[\w-]+)", PAGE.partition(f"{heading}\n")[2].partition("\n#")[0])
        assert len(named) > 5
        assert {flag for flag in named if flag not in own} == set(), heading
