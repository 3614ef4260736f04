"""What a checkpoint recommends is used, and what cannot be used is told in one sentence before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import cases

from octavo import LLM, SamplingParams
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.messages import StructuredOutput
from octavo.text.generation_config import Generation
from octavo.text.tokenizer import load_tokenizer


def write(directory: Path, **values: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def test_names_of_sampling_params(tmp_path: Path) -> None:
    given = {"temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 7}
    found = Generation.of(write(tmp_path, **given, do_sample=True, top_h=None)).sampling()
    assert found == {key: value for key, value in given.items() if key != "max_new_tokens"} | {"max_tokens": 7}
    assert Generation.of(tmp_path / "nowhere").sampling() == {}


@cases("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"])
@cases("value", ["0.5", [1], {"a": 1}, True, float("nan"), -7, 1e400])
def test_wrong_values_are_one_sentence(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(OctavoError, match=rf"generation_config.json: {name} must be [^\n]+\.$"):
        Generation.of(write(tmp_path, **{name: value})).sampling()


@cases("value", ["0", [1, "2"], 1.5, True, -1, {"a": 1}, [[1]], [None]])
@cases("name", ["generation_config.json", "config.json"])
def test_ends_that_are_no_ids(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(OctavoError, match=rf"{name}: eos_token_id must be a token id or a list of them, not [^\n]+\.$"):
        Generation.of(tmp_path).eos_token_ids()


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


def test_settings_of_another_directory_and_of_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "other").mkdir()
    write(tmp_path, temperature=0.3, top_k=4, eos_token_id=[1, 2])
    write(tmp_path / "other", temperature=0.9, max_new_tokens=5)
    own = Generation.of(tmp_path)
    assert (own.sampling(), own.eos_token_ids()) == ({"temperature": 0.3, "top_k": 4}, {1, 2})
    other = own._replace(settings=tmp_path / "other", overrides={"top_p": 0.5, "max_new_tokens": 9})
    assert (other.sampling(), other.eos_token_ids()) == ({"temperature": 0.9, "top_p": 0.5, "max_tokens": 9}, {7})
    none = own._replace(recommended=False, overrides={"temperature": 0})
    assert (none.sampling(), none.eos_token_ids()) == ({"temperature": 0}, {1, 2})  # ends are not sampling
    for overrides, sentence in (
        ({"seed": 1}, "--override-generation-config: seed is no sampling parameter; it takes temperature, top_p"),
        ({"top_k": 0.5}, "--override-generation-config: top_k must be an integer, not 0.5."),
        ({"top_p": 7}, "--override-generation-config: top_p must be between 0 and 1, not 7."),
    ):
        with pytest.raises(OctavoError, match=re.escape(sentence)):
            own._replace(overrides=overrides).sampling()


def test_flags_of_tokenizer_and_settings_reach_llm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in Path(MODEL_DIR).iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            (tmp_path / path.name).symlink_to(path)
    for options, sentence in (
        ({"tokenizer": str(tmp_path)}, f"tokenizer {tmp_path} has no tokenizer.json; give a directory with one"),
        ({"generation_config": "/nowhere"}, "generation_config /nowhere has no generation_config.json"),
    ):
        with pytest.raises(OctavoError, match=sentence):
            LLM(tmp_path, **options)
    asked: dict[str, Any] = {"override_generation_config": {"temperature": 0.25}, "num_gpu_blocks_override": 70}
    llm = LLM(tmp_path, tokenizer=str(MODEL_DIR), dtype="half", swap_space=4, max_model_len=-1, **asked)
    assert [record.getMessage() for record in caplog.records] == [
        "Taken without effect: swap_space.",
        'dtype="half" is served in bfloat16, which has the same size and a wider range.',
    ]
    assert llm.get_default_sampling_params().temperature == 0.25
    params = SamplingParams(max_tokens=4, structured=StructuredOutput("regex", "[ab]{3}"))
    assert re.fullmatch("[ab]{3}", llm.generate("def", params)[0].outputs[0].text)  # the engine reads that tokenizer, too
    assert llm.info.num_blocks == 70
