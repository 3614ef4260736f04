"""docs/compatibility.md is what its script prints, and says yes of what is served here, with both flags."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import relative_error, tokens
from models.test_kimi import kimi, write
from models.test_logits import CASES, randomize
from models.test_qwen3_vl import qwen3_vl, qwen3_vl_moe

from octavo import LLM, SamplingParams
from octavo.models import MODEL_TYPES
from octavo.models.published import KNOWN

ROOT = Path(__file__).parents[2]
SERVED = sorted({config["model_type"] for config in KNOWN.values()} & set(MODEL_TYPES))
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
