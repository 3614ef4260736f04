"""What a checkpoint recommends is used, and what cannot be used is told in one sentence before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import cases

from octavo import LLM
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.text.generation_config import default_sampling, eos_token_ids
from octavo.text.tokenizer import load_tokenizer


def write(directory: Path, **values: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def test_names_of_sampling_params(tmp_path: Path) -> None:
    given = {"temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 7}
    found = default_sampling(write(tmp_path, **given, do_sample=True, top_h=None))
    assert found == {key: value for key, value in given.items() if key != "max_new_tokens"} | {"max_tokens": 7}
    assert default_sampling(tmp_path / "nowhere") == {}


@cases("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"])
@cases("value", ["0.5", [1], {"a": 1}, True, float("nan"), -7, 1e400])
def test_wrong_values_are_one_sentence(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(OctavoError, match=rf"generation_config.json: {name} must be [^\n]+\.$"):
        default_sampling(write(tmp_path, **{name: value}))


@cases("value", ["0", [1, "2"], 1.5, True, -1, {"a": 1}, [[1]], [None]])
@cases("name", ["generation_config.json", "config.json"])
def test_ends_that_are_no_ids(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(OctavoError, match=rf"{name}: eos_token_id must be a token id or a list of them, not [^\n]+\.$"):
        eos_token_ids(tmp_path)


def test_a_server_and_llm_say_it_before_they_load(tmp_path: Path) -> None:
    for path in Path(MODEL_DIR).iterdir():
        if path.suffix == ".json":
            shutil.copy(path, tmp_path)
    write(tmp_path, temperature="hot")
    for load in (load_tokenizer, LLM):
        with pytest.raises(OctavoError, match='temperature must be a number, not "hot"'):
            load(tmp_path)


def test_max_new_tokens_is_used(tmp_path: Path) -> None:
    for path in Path(MODEL_DIR).iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    write(tmp_path, max_new_tokens=5, temperature=0.0)
    llm = LLM(tmp_path, device="cpu", threads=1, cpu_kv_cache_gib=0.1, max_model_len=64)
    assert llm.get_default_sampling_params().max_tokens == 5
    assert len(llm.generate("def f", use_tqdm=False)[0].outputs[0].token_ids) == 5
    assert len(llm.generate([[70] * 62], use_tqdm=False)[0].outputs[0].token_ids) == 2  # as far as they fit
