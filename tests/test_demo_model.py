"""The shipped demo model: sizes, numbers and text, read without the engine."""

import json

import jinja2
import pytest
import torch
from cases import cases
from safetensors import safe_open
from tokenizers import Tokenizer

from octavo.demo import HELDOUT, MODEL_DIR

ODD_TEXTS = [
    "",
    " leading and trailing  ",
    "def read(self):\n\treturn self._data[:-1]  # tabs\n\n\n    \n",
    "windows\r\nline\r\nends\r",
    "naïve café — “quotes”, 日本語, Ελληνικά, עברית",
    "emoji 🙂👩‍👩‍👧 and combining e\u0301",
    "\x00\x07\u200d\ufeff",
    "0123456789 3.14e-10 0xdeadbeef",
]


def load_json(name):
    return json.loads((MODEL_DIR / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def tensors():
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def test_weights_are_small_bf16_and_finite(tensors):
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 15 * 2**20
    assert 5e6 <= sum(t.numel() for t in tensors.values()) <= 10e6
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.isfinite().all(), name
        assert tensor.any(), name


def test_tensors_are_those_the_config_describes(tensors):
    config = load_json("config.json")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    expected = {
        f"model.layers.{i}.{name}.weight": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()
    }
    expected["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    expected["model.norm.weight"] = (hidden,)
    assert config["tie_word_embeddings"]
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected


@cases("text", ODD_TEXTS)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_knows_indentation_and_adds_nothing(tokenizer):
    assert len(tokenizer.encode("\n        ").ids) == 1
    assert len(tokenizer.encode("self").ids) == 1


def test_special_tokens_match_the_configuration(tokenizer):
    config, generation = load_json("config.json"), load_json("generation_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    stops = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert generation["eos_token_id"] == stops


def test_chat_template_renders_chatml():
    config = load_json("tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    template = jinja2.Template(config["chat_template"])
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_heldout_text_and_notices_are_there():
    assert 100_000 <= HELDOUT.stat().st_size <= 200_000
    text = HELDOUT.read_text("utf-8")
    for part in ("class Fraction(", "class TextWrapper", "def heappush("):
        assert part in text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL_DIR / "LICENSE-PSF.txt").read_text("utf-8")
    assert "erplexity" in (MODEL_DIR / "README.md").read_text("utf-8")
