"""Structured output of a random model, which would never write JSON by itself."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections import defaultdict

import pytest
import torch
from cases import cases
from conftest import COMMON
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM
from octavo.demo import MODEL_DIR
from octavo.engine import grammar_work
from octavo.engine.grammar import Grammar, GrammarCompiler, GrammarSpeed
from octavo.errors import InvalidRequest, OctavoError
from octavo.messages import EngineRequest, SamplingParams, StructuredOutput
from octavo.server.protocol import Function, Tool
from octavo.server.structured import _choice, calls_of
from octavo.text import llguidance_grammar
from octavo.text.llguidance_grammar import serialize

EOS = frozenset({0})
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["paper", "vellum", 3, None]},
        "bound": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 6},
        "pages": {"type": "integer", "minimum": 8, "maximum": 512},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "bound", "name", "pages", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]: (true|maybe é)"


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    path = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**COMMON | dict(vocab_size=4096, num_hidden_layers=1, eos_token_id=0))).save_pretrained(path)
    shutil.copy(MODEL_DIR / "tokenizer.json", path)
    return LLM(path, device="cpu", threads=1, cpu_kv_cache_gib=0.1)


def outputs(llm: LLM, kind: str, grammar: str = "", count: int = 6, **params):
    structured = StructuredOutput(kind, grammar)
    wanted = SamplingParams(n=count, seed=0, structured=structured, **dict(max_tokens=400) | params)
    return llm.generate([[70, 71, 72]], wanted, use_tqdm=False)[0].outputs


def test_json_schema(llm):
    found = outputs(llm, "json_schema", json.dumps(SCHEMA), count=12)
    for out in found:
        assert out.finish_reason == "stop"
        value = json.loads(out.text)
        assert list(value) == list(SCHEMA["properties"])
        assert value["kind"] in ["paper", "vellum", 3, None]
        assert isinstance(value["bound"], bool)
        assert len(value["name"]) <= 6
        assert isinstance(value["pages"], int)
        assert 8 <= value["pages"] <= 512
        assert 1 <= len(value["tags"]) <= 2
    assert len({out.text for out in found}) == 12
    assert {json.loads(out.text)["bound"] for out in found} == {True, False}


def test_json_object(llm):
    """A random model seldom closes what it opened: the brackets are made likely and the rest is left to the grammar."""
    tokenizer = llm.get_tokenizer()
    closing = {tokenizer.token_id(text): 9.0 for text in ("}", '"', "]", '":', '"}')} | {0: 9.0}
    bias = {token: value for token, value in closing.items() if token is not None}
    done = [out for out in outputs(llm, "json_object", count=20, logit_bias=bias) if out.finish_reason == "stop"]
    assert len(done) > 10
    assert all(isinstance(json.loads(out.text), dict) for out in done)
    assert any(json.loads(out.text) for out in done)


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("regex", DATE),
        ("lark", 'start: "yes" | "no" number\nnumber: /[0-9]{2}/'),
        ("lark", 'root ::= "yes" | "no" number\nnumber ::= [0-9]{2}'),
    ],
)
def test_other_grammars(llm, kind, grammar):
    pattern = DATE if kind == "regex" else r"yes|no\d\d"
    for params in (dict(), dict(temperature=0), dict(temperature=2.0, top_p=0.9), dict(top_k=3), dict(repetition_penalty=1.5)):
        found = outputs(llm, kind, grammar, **params)
        for out in found:
            assert out.finish_reason == "stop"
            assert re.fullmatch(pattern, out.text), out.text


def test_neighbours_are_free(llm):
    """Requests with and without a grammar in one batch; the free one's tokens do not change."""
    free = SamplingParams(seed=3, max_tokens=30)
    bound = SamplingParams(seed=3, max_tokens=40, structured=StructuredOutput("regex", DATE))
    alone = [llm.generate([[70, 71, 72]], one, use_tqdm=False)[0].outputs[0].token_ids for one in (free, bound)]
    both = llm.generate([[70, 71, 72]] * 4, [free, bound, free, bound], use_tqdm=False)
    assert [out.outputs[0].token_ids for out in both] == alone * 2
    assert not re.match(r"19|20", llm.get_tokenizer().decode(alone[0]))


def test_a_finished_grammar_ends_before_min_tokens(llm):
    """Nothing but the end may follow it, whatever was asked."""
    for temperature in (0, 1):
        for out in outputs(llm, "regex", "(ab|cd)", min_tokens=20, temperature=temperature, logit_bias={0: -100.0}):
            assert (out.text in ("ab", "cd"), out.finish_reason) == (True, "stop")
            assert out.token_ids[-1] == 0
    for out in outputs(llm, "regex", "(ab|cd)", ignore_eos=True, max_tokens=8):
        assert (out.text in ("ab", "cd"), out.finish_reason) == (True, "length")


@cases(
    ("kind", "grammar"),
    [
        ("json_schema", "not json"),
        ("json_schema", '{"type": "nonsense"}'),
        ("json_schema", "[]"),
        ("json_schema", "false"),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("regex", "(ab"),
        ("regex", "(?=a)b"),
        ("regex", "\ud800"),
        ("lark", "start: /a"),
    ],
)
def test_a_grammar_that_cannot_be(llm, kind, grammar):
    core = llm._core
    with pytest.raises(InvalidRequest, match=r"^structured cannot be followed: [^\n]+\.$") as caught:
        outputs(llm, kind, grammar)
    assert caught.value.param == "structured"
    assert not core.has_work()
    assert not core.generations
    assert outputs(llm, "regex", "(ab|cd)")[0].text in ("ab", "cd")


def test_a_grammar_that_the_engine_refuses(llm):
    """What only the vocabulary shows, or what another front end sent."""
    core = llm._core
    core.add(*(EngineRequest(name, [5], SamplingParams(), EOS, "start: /a") for name in ("bad", "too")))
    ended = []
    while core.has_work():
        ended += core.step()[0]
    assert [(output.request_id, output.finish_reason) for output in ended] == [("bad", "abort"), ("too", "abort")]
    assert all("grammar of the structured output does not compile" in str(output.error) for output in ended)
    assert not core.generations


def test_what_was_validated_is_what_is_compiled(llm, monkeypatch):
    """One text, validated once however often it is asked for, crosses and meets the vocabulary."""
    validated, compiled = [], []
    validate, compile_ = LLMatcher.validate_grammar, GrammarCompiler.compile
    monkeypatch.setattr(llguidance_grammar, "validate", lambda text: validated.append(text) or validate(text))
    monkeypatch.setattr(GrammarCompiler, "compile", lambda self, text, eos: compiled.append(text) or compile_(self, text, eos))
    wanted = StructuredOutput("json_schema", '{"enum": ["validated", "once"]}')
    for _ in range(3):
        outputs(llm, wanted.kind, wanted.grammar, count=2)
    assert validated == [serialize(wanted)]
    assert compiled == [serialize(wanted)] * 3, "once for both sequences"


def test_without_a_tokenizer(tmp_path):
    compiler = GrammarCompiler(tmp_path, 4096)
    with pytest.raises(OctavoError, match=r"structured output needs .*tokenizer\.json"):
        compiler.compile(serialize(StructuredOutput("json_object")), EOS)


def test_a_tokenizer_that_llguidance_does_not_read(tmp_path):
    """Its error, which ended the engine, is the request's."""
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(OctavoError, match=r"^structured output cannot be had with this model's tokenizer: .*decoder.*\.$"):
        GrammarCompiler(tmp_path, 2).compile(serialize(StructuredOutput("json_object")), EOS)


def test_a_model_with_more_rows_than_tokens():
    """Vocabularies are padded; the rows past the tokenizer's are never allowed."""
    grammar = GrammarCompiler(MODEL_DIR, 4200).compile(serialize(StructuredOutput("regex", "[a-z]+")), EOS)
    forbidden = grammar.forbidden()
    assert forbidden.shape == (4200,)
    assert forbidden[4096:].all()
    assert forbidden[0]
    assert not forbidden.all()


def test_a_tokenizer_with_more_tokens_than_the_model():
    """Such as one with a token for padding that config.json does not count: the model samples none of them."""
    found = GrammarCompiler(MODEL_DIR, 300).compile(serialize(StructuredOutput("regex", "[0-9]+")), EOS)
    whole = GrammarCompiler(MODEL_DIR, 4096).compile(serialize(StructuredOutput("regex", "[0-9]+")), EOS)
    for grammar in (found, found.copy()):
        assert torch.equal(grammar.forbidden(), whole.forbidden()[:300])
    assert not found.forbidden().all()


def test_many_choices_are_an_automaton(llm):
    """As alternatives of a rule, 2,000 were too many items and the engine of grammars gave up after the first token."""
    choices = [f"item {i} é{i * 7}" for i in range(5_000)]
    param, kind, grammar = _choice("guided_choice", choices)
    for out in outputs(llm, kind, grammar):
        assert out.text in choices, (param, out.text)
        assert out.finish_reason == "stop"


def test_many_tools(llm):
    parameters = {"type": "object", "properties": {"p": {"type": "boolean"}}}
    tools = [Tool(function=Function(name=f"tool_{i}", parameters=parameters)) for i in range(2_000)]
    for out in outputs(llm, "json_schema", calls_of(tools, True).grammar, count=2):
        (call,) = json.loads(out.text)
        assert call["name"] in {tool.function.name for tool in tools}
        assert out.finish_reason == "stop"


def item(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


def tool(name, **schema):
    return Tool(function=Function(name=name, parameters=schema))


TEXT, NUMBER = {"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 0, "maximum": 99}
REFERRING = [
    tool("a", **item(x={"$ref": "#/$defs/Item"}), **{"$defs": {"Item": item(text=TEXT)}}),
    tool("b", **item(x={"$ref": "#/$defs/Item"}), **{"$defs": {"Item": item(number=NUMBER)}}),  # another class of that name
    tool("c", **item(x={"$ref": "#/definitions/Item"}), definitions={"Item": item(both=NUMBER)}),
    tool("d", **item(x=TEXT, y={"$ref": "#/properties/x"})),
    tool("e", **item(x={"anyOf": [{"$ref": "#"}, {"type": "null"}]})),  # of itself
    tool("f", **item(x={"const": {"$ref": "#/no/schema"}})),
]


CALLS = {
    "a": ('{"x": {"text": "ab"}}', '{"x": {"number": 7}}'),
    "b": ('{"x": {"number": 7}}', '{"x": {"text": "ab"}}'),
    "c": ('{"x": {"both": 7}}', '{"x": {"text": "ab"}}'),
    "d": ('{"x": "ab", "y": "c"}', '{"x": "ab", "y": 7}'),
    "e": ('{"x": {"x": {"x": null}}}', '{"x": [{"name": "e", "parameters": {"x": null}}]}'),
    "f": ('{"x": {"$ref": "#/no/schema"}}', '{"x": {"$ref": "#/$defs/5/no/schema"}}'),
}


@cases("name", CALLS)
def test_references_within_a_tool_are_its_own(name):
    """They count from the root of the tool's parameters, as JSON Schema has it, whatever other tools call alike."""
    tokenizer = LLTokenizer((MODEL_DIR / "tokenizer.json").read_text())
    grammar = serialize(calls_of(REFERRING, True))
    right, wrong = CALLS[name]
    for parameters, allowed in ((right, True), (wrong, False)):
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer.tokenize_str(f'[{{"name": "{name}", "parameters": {parameters}}}]')
        assert (matcher.validate_tokens(tokens) == len(tokens)) is allowed, parameters


@pytest.mark.parametrize("odd", [{"$defs": "x"}, {"$defs": [1]}, {"definitions": 5}, {"$defs": {"a": 5}}], ids=str)
def test_odd_definitions_are_no_fault_of_the_server(odd):
    assert serialize(calls_of([tool("a", **item(x=TEXT), **odd)], False))  # nothing refers to them


@cases("character", ["\x7f", "\x01", "\n", '"', "\\", "\x9f", "\u2028", "\ufeff", "🌶", "/"], ids=ascii)
def test_a_choice_may_hold_any_character(llm, character):
    _, kind, grammar = _choice("guided_choice", [f"a{character}b"])
    (out,) = outputs(llm, kind, grammar, count=1)
    assert out.text == f"a{character}b"


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("regex", "a{300000}"),
        ("lark", "start: " + " | ".join(f'"item {i}"' for i in range(20_000))),
        ("json_schema", '{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}'),
    ],
    ids=["regex", "alternatives", "nothing fits"],
)
def test_a_grammar_that_breaks_ends_the_request_with_an_error(llm, kind, grammar):
    sentence = r"^The structured output cannot be followed any further: [^\n]+\.$"
    with pytest.raises(InvalidRequest, match=sentence):
        outputs(llm, kind, grammar, count=1)
    good = SamplingParams(max_tokens=8, structured=StructuredOutput("regex", "(ab|cd)"))
    wrong = SamplingParams(max_tokens=8, structured=StructuredOutput(kind, grammar))
    for result, given in zip(llm.generate(["a"] * 3, [good, wrong, good], use_tqdm=False), (good, wrong, good), strict=True):
        (out,) = result.outputs
        assert out.finish_reason == "abort" if given is wrong else out.text in ("ab", "cd")
        assert re.match(sentence, out.error) if given is wrong else out.error is None
        assert "NoExtension" not in str(out.error)
    assert not llm._core.has_work()
    assert not llm._core.generations
    assert outputs(llm, "regex", "(ab|cd)")[0].text in ("ab", "cd")


class Slow:
    """A grammar that takes its time, in which 70 and nothing else is allowed."""

    finished, error = False, None

    def __init__(self, seconds: float):
        self.seconds, self.found, self.speed = seconds, 0, GrammarSpeed(slow=seconds > grammar_work.PATIENCE)

    def find(self) -> None:
        time.sleep(self.seconds)
        self.found += 1

    def copy(self) -> Slow:
        return Slow(self.seconds)

    def forbidden(self) -> torch.Tensor:
        assert self.found, "a step does not find tokens itself"
        return torch.arange(4096) != 70

    def accept(self, token: int) -> None:
        assert token == 70


def bystander_waits(core, bystander: int = 300) -> tuple[list[float], dict[str, list[int]]]:
    """How long each step of a free request took beside what was added before, and all tokens by request."""
    core.add(EngineRequest("free", [5, 6], SamplingParams(max_tokens=bystander, temperature=0, ignore_eos=True), EOS))
    waits, got = [], defaultdict(list)
    while core.has_work():
        start = time.perf_counter()
        outputs = core.step()[0]
        assert not any(output.error for output in outputs)
        for output in outputs:
            got[output.request_id] += output.token_ids
        if any(output.request_id == "free" for output in outputs):
            waits.append(time.perf_counter() - start)
    return waits, got


@pytest.mark.parametrize(("compiling", "finding", "count"), [(0.6, 0.0, 1), (0.0, 0.6, 1), (0.1, 0.1, 6)])
def test_nobody_waits_for_a_grammar(llm, monkeypatch, compiling, finding, count):
    def compile_(self, text, eos):
        time.sleep(compiling)
        return Slow(finding)

    core = llm._core
    monkeypatch.setattr(GrammarCompiler, "compile", compile_)
    monkeypatch.setattr(Slow, "copy", lambda self: found(Slow(self.seconds)))
    asked = SamplingParams(max_tokens=3)
    start = time.perf_counter()
    core.add(*(EngineRequest(f"bound{i}", [7], asked, EOS, "slow") for i in range(count)))
    begun = time.perf_counter() - start
    waits, got = bystander_waits(core)
    assert len(got["free"]) == len(waits) == 300
    assert all(got[f"bound{i}"] == [70] * 3 for i in range(count))
    assert max(*waits, begun) < 0.4, waits  # 5 ms, and what the machine does beside this; who waited would wait 0.6 s
    assert not core.scheduler.request_ids
    assert not core.grammars.busy
    assert core.scheduler.pool.usage == 0


def found(grammar: Slow) -> Slow:
    grammar.found = 1
    return grammar


@pytest.mark.parametrize("where", ["compile", "find"])
def test_a_grammar_that_takes_too_long(llm, monkeypatch, where):
    core, release = llm._core, threading.Event()
    monkeypatch.setattr(grammar_work, "LIMIT", 0.1)
    grammar = found(Slow(0))

    def hang(*_):
        assert release.wait(20)
        return grammar

    calls: list[int] = []

    def find(one: Slow) -> None:
        if one is not grammar:  # what a test before this one left in a thread
            return
        calls.append(1)
        if len(calls) > 1:  # the first is part of compiling
            hang()

    grammar.speed.slow = True
    monkeypatch.setattr(GrammarCompiler, "compile", hang if where == "compile" else lambda *_: grammar)
    monkeypatch.setattr(Slow, "find", find)
    core.add(EngineRequest("slow", [7], SamplingParams(max_tokens=3), EOS, "slow"))
    ended, deadline = [], time.monotonic() + 10
    while core.has_work() and time.monotonic() < deadline:
        ended += core.step()[0]
    release.set()
    assert (ended[-1].finish_reason, ended[-1].request_id) == ("abort", "slow")
    assert ("was not compiled within 0.1 s" if where == "compile" else "takes too long") in str(ended[-1].error)
    assert not core.generations
    assert core.scheduler.pool.usage == 0


def test_aborting_while_a_grammar_compiles(llm, monkeypatch):
    core, release = llm._core, threading.Event()
    monkeypatch.setattr(GrammarCompiler, "compile", lambda *_: release.wait(20) and found(Slow(0)))
    core.add(*(EngineRequest(name, [7], SamplingParams(max_tokens=2), EOS, "slow") for name in ("gone", "kept")))
    outputs, stats = core.step()
    assert (outputs, stats.num_waiting, stats.num_deferred) == ([], 0, 2)
    core.abort("gone")
    release.set()
    got = []
    while core.has_work():
        got += [output.request_id for output in core.step()[0]]
    assert got == ["kept", "kept"]
    core.add(EngineRequest("all", [7], SamplingParams(max_tokens=2), EOS, "slow"))
    core.abort("all")
    assert not core.has_work()
    assert not core.generations


def test_a_grammar_that_turns_slow_costs_one_wait_for_all_its_sequences(llm, monkeypatch):
    core, slow = llm._core, []
    find = Grammar.find

    def turns_slow(self):
        if self.tokens == 2:
            time.sleep(0.15)
            slow.append(threading.current_thread() is threading.main_thread())
        find(self)
        self.speed.slow |= bool(slow)

    def accept(self, token):
        self.tokens += 1
        self._forbidden = None

    monkeypatch.setattr(Grammar, "tokens", 0, raising=False)
    monkeypatch.setattr(Grammar, "find", turns_slow)
    monkeypatch.setattr(Grammar, "accept", accept)
    text = serialize(StructuredOutput("regex", "[a-z ]+"))
    core.add(*(EngineRequest(str(i), [7], SamplingParams(max_tokens=4), EOS, text) for i in range(8)))
    waits, _ = bystander_waits(core)
    assert slow.count(True) == 1
    assert slow.count(False) == 7
    assert max(waits) < 0.6, "one of 0.15 s, not eight"
