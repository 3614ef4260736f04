"""The tokenizer's files, its tokens as bytes, and chat templates against transformers."""

import json

import pytest
import tokenizers
from cases import cases
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from octavo.demo import MODEL_DIR
from octavo.errors import InvalidRequest, OctavoError
from octavo.text.chat_template import render_chat
from octavo.text.generation_config import Generation
from octavo.text.tokenizer import Tokenizer, load_tokenizer

LIBRARY = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))  # the text of tokens, by who wrote them
TEXT = "Hello, wörld! 👩‍👩‍👧 naïve 日本語 \n\t x"


def sentencepiece(directory):
    """A tokenizer as Llama 2's: ▁ for space, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "c", "▁a", "ab", "▁ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def demo():
    return Tokenizer(MODEL_DIR)


def test_round_trip(demo):
    ids = demo.encode(TEXT)
    assert demo.decode(ids) == TEXT
    assert b"".join(map(demo.token_bytes, ids)) == TEXT.encode()
    assert "".join(demo.token_text(i) for i in demo.encode("plain words")) == "plain words"


def test_every_token_has_the_bytes_that_decoding_shows(demo):
    for token_id in range(demo.vocab_size):
        assert demo.token_text(token_id) == LIBRARY.decode([token_id], skip_special_tokens=False)
        assert demo.token_text(token_id) == demo.decode([token_id], skip_special_tokens=False)
    assert demo.token_bytes(10**6) == b""


@cases("word", ["đem", "čaj", "ilÖveyou", "naïve", "<ñ>", "日本"])
def test_an_added_token_reads_as_it_is_spelled(tmp_path, word):
    """Its letters may be those that byte-level BPE spells bytes with."""
    backend = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    backend.add_tokens([word])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.token_text(tokenizer.token_id(word)) == word
    assert tokenizer.decode(tokenizer.encode(f"a {word} é")) == f"a {word} é"


def test_sentencepiece_bytes(tmp_path):
    tokenizer = Tokenizer(sentencepiece(tmp_path))
    ids = tokenizer.encode("ab é ab")
    assert tokenizer.decode(ids) == "ab é ab"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " ab é ab".encode()  # the first space is the decoder's affair
    assert tokenizer.token_bytes(tokenizer.token_id("<0xE2>")) == b"\xe2"
    assert tokenizer.token_bytes(tokenizer.token_id("▁ab")) == b" ab"


def test_metaspace_bytes(tmp_path):
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("a", -3.0)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).token_bytes(2) == b" a"
    assert Tokenizer(tmp_path).token_bytes(3) == b"a"


def test_what_the_files_say(tmp_path):
    sentencepiece(tmp_path)
    config = {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6, "top_k": 20, "x": 1}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.eos_token_ids == {2, 7, 8}
    assert tokenizer.special_ids == {1, 2}
    assert tokenizer.default_sampling == {"temperature": 0.6, "top_k": 20}
    assert tokenizer.bos_token_id == 1
    assert (tokenizer.template_for(tools=False), tokenizer.template_for(tools=True)) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer(tmp_path).chat_template == "F"


@cases("added", ["$A", "<s> $A", "<s> $A </s>"])
@cases("says", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
@cases("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_special_tokens_are_added_as_transformers_adds_them(tmp_path, added, says, kind):
    sentencepiece(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(added, special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", **says}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("ab", "", "<s>ab"):
        assert Tokenizer(tmp_path).encode(text) == theirs(text).input_ids
        assert Tokenizer(tmp_path).encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    assert (1 in Tokenizer(tmp_path).encode("ab")) == ("<s>" in added)


def test_eos_of_the_text_model(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 3}}')
    assert Generation.of(tmp_path).eos_token_ids() == {3}
    assert Generation.of(tmp_path).sampling() == {}


def test_clear_errors(tmp_path, demo):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(OctavoError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(OctavoError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path)
    sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(OctavoError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        demo.encode("half \ud800")


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
TEMPLATES = {
    "chatml": CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "tools": """{{ bos_token }}
{%- if tools %}
    {{- "# Tools\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for m in messages %}
    {%- if loop.index0 == 1 %}{% continue %}{% endif %}
    {% generation %}[{{ m.role | upper }}]{{ m.content | trim }}{% endgeneration %}
{% endfor %}{{ eos_token }}""",
    "state": """{% set ns = namespace(last=-1, seen={}) %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{ ns.last }} {{ dict(a=1)['a'] }} {{ enable_thinking is defined and not enable_thinking }} {{ documents }} {{ pad_token }}
{{ messages[::-1][0].content.split(' ')[-1].strip('!') }} {{ strftime_now('%Y') }}""",
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüße, 世界! "},
    {"role": "assistant", "content": " Hello you!"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


@cases("name", TEMPLATES)
@cases("tools", [None, TOOLS])
def test_chat_templates_read_as_in_transformers(demo, name, tools):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=demo._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    switches = {"add_generation_prompt": True, "enable_thinking": False}
    expected = theirs.apply_chat_template(MESSAGES, chat_template=TEMPLATES[name], tools=tools, tokenize=False, **switches)
    assert render_chat(TEMPLATES[name], MESSAGES, special, tools, **switches) == expected


@cases(
    ("template", "sentence"),
    [
        ("{{ raise_exception('Only user turns.') }}", "^Only user turns.$"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "cannot render"),
    ],
)
def test_a_template_that_refuses(template, sentence):
    with pytest.raises(InvalidRequest, match=sentence):
        render_chat(template, MESSAGES, {})


def test_a_template_that_is_none():
    with pytest.raises(OctavoError, match="not valid jinja"):
        render_chat("{% if %}", MESSAGES, {})
