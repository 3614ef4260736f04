"""docs/compatibility.md is what its script prints, and says yes of what is served here, with both flags."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import relative_error, tokens
from engine.test_core import run, token_ids
from engine.test_images import ENGINE, IMAGE, image, prompt
from models.test_kimi import kimi, write
from models.test_logits import CASES, randomize
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.layers.vision import patch_values
from octavo.messages import EngineRequest
from octavo.models import MODEL_TYPES
from octavo.models.published import KNOWN

ROOT = Path(__file__).parents[2]
SERVED = sorted({config["model_type"] for config in KNOWN.values()} & set(MODEL_TYPES))
MAKE = {"qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe, "kimi_k25": kimi}
AS_ANOTHER = {"kimi_k2": "deepseek_v3"}  # of which transformers has the class under another name


@pytest.fixture(scope="module")
def compatibility() -> Any:
    """scripts/compatibility.py"""
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "scripts/compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(compatibility: Any) -> list[Any]:
    return list(compatibility.rows())


def test_the_page_is_what_the_script_prints(compatibility: Any, rows: list[Any]) -> None:
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert page == compatibility.page(), "run python scripts/compatibility.py > docs/compatibility.md"
    kinds = {row.model_type.strip("`"): row for row in rows}
    assert {kind for kind, row in kinds.items() if row.fp8 == "yes"} == set(SERVED)
    assert all(row.kv.startswith("yes: ") == (row.fp8 == "yes") for row in kinds.values())


@cases("model_type", SERVED)
def test_what_the_page_says_yes_of_is_served(model_type: str, rows: list[Any], tmp_path: Path) -> None:
    """In the format that it says; log-probabilities are transformers' but for what eight bits cost."""
    if model_type == "kimi_k25":
        reference = kimi()
        write(tmp_path, reference, int4=True)
    elif model_type in ("qwen3_vl", "qwen3_vl_moe"):
        torch.manual_seed(0)
        reference = qwen3_vl() if model_type == "qwen3_vl" else qwen3_vl_moe()
        reference.save_pretrained(tmp_path)
    else:
        reference = _written(model_type, tmp_path)
    how: dict[str, Any] = dict(device="cpu", threads=1, cpu_kv_cache_gib=0.05, max_num_batched_tokens=50)
    llm = LLM(tmp_path, quantization="fp8", kv_cache_dtype="fp8", **how)
    (said,) = {row.kv.split("`")[1] for row in rows if row.model_type == f"`{model_type}`"}
    report = "\n".join(llm.info.report)
    assert f"KV cache: {said}" in report
    assert "  fp8  " in report

    ids, params = tokens(70), SamplingParams(max_tokens=24, seed=1, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    (output,) = llm.generate([ids], params, use_tqdm=False)
    own = output.outputs[0]
    assert len(set(own.token_ids)) > 4
    every = [*ids, *own.token_ids]
    entries = [*(output.prompt_logprobs or [])[1:], *(own.logprobs or [])]
    found = torch.tensor([entry[token].logprob for entry, token in zip(entries, every[1:], strict=True)])
    assert all(math.isfinite(value) for value in found.tolist())
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([every])).logits[0, :-1].log_softmax(-1)
    exact = expected.gather(1, torch.tensor(every[1:])[:, None])[:, 0]
    assert relative_error(found - exact.mean(), exact - exact.mean()) < 0.4


@cases("model_type", sorted({"qwen3_vl", "qwen3_vl_moe", "kimi_k25"} & set(SERVED)))
def test_what_the_page_says_reads_images_is_served_with_one(model_type: str, rows: list[Any], tmp_path: Path) -> None:
    """FP8, an FP8 cache, both, none: log-probabilities behind a picture are transformers', and not those of another picture."""
    family = model_type.removesuffix("_moe")
    torch.manual_seed(0)
    reference = MAKE[model_type]()
    if family == "kimi_k25":
        write(tmp_path, reference, int4=True)
    else:
        reference.save_pretrained(tmp_path)
    (row,) = {(row.kv.split("`")[1], "images, " in row.note) for row in rows if row.model_type == f"`{model_type}`"}
    assert row[1]
    text = [10, 11, IMAGE, *tokens(20)]
    params = dict(max_tokens=12, temperature=1.0, seed=1, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    asked, other = (prompt(name, text, image(family, seed), **params) for seed, name in enumerate("ab"))
    for quantization in (None, "fp8"):
        for kv in ("auto", "fp8"):
            options = ENGINE | dict(dtype="bfloat16", quantization=quantization, kv_cache_dtype=kv)
            core = EngineCore(EngineConfig(model=str(tmp_path), **options))
            report = "\n".join(core.info.report)
            assert (f"KV cache: {row[0]}" in report) == (kv == "fp8")
            assert (re.search(r"^  vision +fp8 ", report, re.MULTILINE) is not None) == (quantization == "fp8")
            outputs = run(core, [asked])[0]["a"]
            every = [*asked.prompt_token_ids, *token_ids({"a": outputs})["a"]]
            entries = [*(outputs[0].prompt_logprobs or [])[1:], *(one for o in outputs for one in o.logprobs or [])]
            found = torch.tensor([entry[0].logprob for entry in entries])
            errors = []
            for each in (asked, other):
                exact = _with_image(family, reference, each, every).log_softmax(-1)[:-1]
                exact = exact.gather(1, torch.tensor(every[1:])[:, None])[:, 0]
                errors.append(relative_error(found - exact.mean(), exact - exact.mean()))
            own, of_another = errors
            assert own < (0.05 if (quantization, kv) == (None, "auto") else 0.35), (quantization, kv)
            assert own < 0.75 * of_another, (quantization, kv)


def _with_image(family: str, model: Any, asked: EngineRequest, ids: list[int]) -> torch.Tensor:
    """transformers' logits [positions, vocabulary] of `ids`, which begin with the prompt and its image."""
    (placed,) = asked.images
    found = placed.image
    patches = patch_values(torch.from_numpy(found.pixels), torch.from_numpy(found.values), found.frames)
    more: dict[str, Any] = dict(image_grid_thw=torch.tensor([found.grid]))
    if family == "kimi_k25":
        more["pixel_values"] = patches.view(-1, 3, 14, 14)
    else:
        kinds = [[int(placed.start <= at < placed.stop) for at in range(len(ids))]]
        more |= dict(pixel_values=patches, mm_token_type_ids=torch.tensor(kinds))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), **more).logits[0]
    return logits


def _written(model_type: str, directory: Path) -> Any:
    """transformers' model, and its checkpoint."""
    torch.manual_seed(0)
    cases = [case for case in CASES if case.partition(",")[0] == AS_ANOTHER.get(model_type, model_type)]
    # what an indexer chooses by random weights is another choice after any rounding, so it chooses everything
    reference = randomize(CASES[next((case for case in cases if "all chosen" in case), cases[0])]())
    reference.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | dict(model_type=model_type)
    (directory / "config.json").write_text(json.dumps(config))
    return reference
