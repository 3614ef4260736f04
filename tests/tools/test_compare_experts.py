"""`octavo compare` of a mixture of experts: each layer's stacks by themselves, against transformers in float64."""

from __future__ import annotations

import html
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from conftest import relative_error
from models.test_moe_quantized import FakeExperts, tiny
from tools.test_compare import IDS, WINDOW, _fp32_sums, changed, compared, config  # noqa: F401
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo import LLM
from octavo.quant import SCHEMES, QuantRules, dequantize, quantize
from octavo.tools.compare import html_report, layer_errors, loss_table
from octavo.tools.compare.compare import compare
from octavo.tools.compare.layer_errors import LayerError, Sensitivity, ignore_list, worth_keeping

STACKS = ("gate_up_proj", "down_proj")


class FakeStack(nn.Module):
    """transformers' experts of which one stack alone goes through FP8, and its inputs with it, in float64."""

    def __init__(self, experts: Any, scheme: str, stack: str):
        super().__init__()
        self.fake, self.stack = FakeExperts(experts, scheme), stack
        plain = [(*gate_up.chunk(2), down) for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)]
        layers = [[_linear(w) for w in one] for one in plain]
        mixed = [
            (*fake[:2], own[2]) if stack == "gate_up_proj" else (*own[:2], fake[2])
            for fake, own in zip(self.fake.experts, layers, strict=True)
        ]
        self.fake.experts = mixed

    def forward(self, *args: Any) -> Tensor:
        return self.fake(*args)


def _linear(w: Tensor) -> nn.Linear:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w, requires_grad=False)
    return linear


def reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").requires_grad_(False)


def run(model: PreTrainedModel) -> tuple[Tensor, list[tuple[Any, Tensor]]]:
    """Log probabilities of the first window in float64, and what each layer's experts were given and gave."""
    calls: list[tuple[Any, Tensor]] = []
    handles = [
        layer.mlp.experts.register_forward_hook(lambda _, args, out: calls.append((args, out))) for layer in model.model.layers
    ]
    found = model(torch.tensor(IDS[:WINDOW])[None]).logits[0, :-1].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    return found, calls


def by_path(found: Sequence[LayerError | Sensitivity]) -> dict[str, Any]:
    return {one.path: one for one in found}


@cases("scheme", ["fp8", "ptpc_fp8", "fp8_block"])
@cases("family", ["qwen3_moe", "mixtral"])
def test_each_stack_by_itself_is_as_in_transformers(family: str, scheme: str, tmp_path: Path) -> None:
    tiny(tmp_path, family)
    found = compared(tmp_path, [scheme], ["auto"], dtype="float32")
    at, down = ("block_sparse_moe", "w2") if family == "mixtral" else ("mlp", "down_proj")
    errors, ranked = by_path(found.layers), by_path(found.ranked)
    assert len(errors) == len(ranked) == len(found.layers) == 3 * 4
    assert sum(one.extra_bytes for one in found.ranked) == found.reference.weight_bytes - found.row_of(scheme).weight_bytes
    model = reference(tmp_path)
    p, calls = run(model)
    for i, layer in enumerate(model.model.layers):
        experts, (args, y) = layer.mlp.experts, calls[i]
        for stack in STACKS:
            path = f"model.layers.{i}.{at}.experts.*.{down if stack == 'down_proj' else stack}"
            matrices = [m for w in getattr(experts, stack) for m in (w.chunk(2) if stack == "gate_up_proj" else [w])]
            wrong = torch.stack([(dequantize(quantize(m, SCHEMES[scheme])) - m).double().square().sum() for m in matrices])
            total = torch.stack([m.double().square().sum() for m in matrices])
            assert errors[path].weight[scheme] == pytest.approx(float((wrong.sum() / total.sum()).sqrt()), rel=1e-4)
            layer.mlp.experts = FakeStack(experts, scheme, stack)
            # a value between two codes goes the other way now and then
            assert errors[path].output[scheme] == pytest.approx(relative_error(layer.mlp.experts(*args), y), rel=0.02)
            q, _ = run(model)
            layer.mlp.experts = experts
            assert ranked[path].kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.1)
            assert ranked[path].kl > 1e-6


def louder(t: dict[str, Tensor]) -> None:
    """Of layer 1's experts the output times 4, so that the model's depends on it."""
    for e in range(7):
        t[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] *= 4


def outliers(t: dict[str, Tensor]) -> None:
    """Of layer 1's experts one channel of up down by 2^20 and down's column that reads it up: exact in BF16.

    FP8 is floating: a factor of 100 costs it little, but 2^20 pushes all other columns of down below its subnormals.
    """
    for e in range(7):
        t[f"model.layers.1.mlp.experts.{e}.up_proj.weight"][5] *= 2.0**-20
        t[f"model.layers.1.mlp.experts.{e}.down_proj.weight"][:, 5] *= 2.0**20


def test_the_stack_that_is_bad_to_quantize_is_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path / "quiet", "qwen3_moe")
    changed(tmp_path / "quiet", tmp_path / "plain", louder)
    hurt = changed(tmp_path / "plain", tmp_path / "hurt", outliers)
    plain, found = (compared(path, ["ptpc_fp8"], ["auto"], dtype="float32") for path in (tmp_path / "plain", hurt))
    assert found.reference.perplexity == pytest.approx(plain.reference.perplexity, rel=1e-5)
    pattern = "model.layers.1.mlp.experts.*.down_proj"
    assert plain.ranked[0].path != pattern
    assert found.ranked[0].path == pattern
    assert found.ranked[0].kl > 10 * found.ranked[1].kl
    assert by_path(found.layers)[pattern].output["ptpc_fp8"] > 0.5 > 10 * by_path(plain.layers)[pattern].output["ptpc_fp8"]
    assert found.ignore == [pattern]
    kept = found.measured[-1]
    assert kept.variant.ignore == (pattern,)
    assert kept.kl < 2 * plain.measured[0].kl < found.measured[0].kl / 4
    loss_table.show(found, None)
    out = capsys.readouterr().out
    assert out[out.index("costs most") :].splitlines()[3].split()[0] == pattern, out
    assert f"--quantization-ignore '{pattern}'" in out
    page = html_report.render(found)
    assert f"<td>{pattern}</td>" in page
    assert f"--quantization-ignore {html.escape(repr(pattern))}<" in page  # which a shell hands on as it is
    llm = LLM(hurt, quantization="ptpc_fp8", quantization_ignore=found.ignore, device="cpu", threads=1, cpu_kv_cache_gib=0.01)
    del llm  # the pattern is one of this model's


def test_many_stacks_are_said_by_one_pattern() -> None:
    """Which the option takes, of any layer."""
    names = [[f"model.layers.{i}.mlp.experts.*.{name}_proj" for name in ("gate", "up")] for i in range(48)]
    ranked = [Sensitivity(one[0].replace("gate", "gate_up"), tuple(one), 0.1, 10) for one in names]
    assert ignore_list(worth_keeping(ranked)) == ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
    rules = QuantRules(SCHEMES["fp8"], ignore_list(worth_keeping(ranked)))
    hit = [rules.ignored(f"model.layers.3.mlp.experts.127.{name}_proj") for name in ("gate", "up", "down")]
    assert hit == [True, True, False]


def test_one_layers_experts_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of quantized stacks, one: the one before is gone when the next is packed."""
    tiny(tmp_path, "qwen3_moe")
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    pack = layer_errors.ops.pack_experts
    watching = False

    def watched(q: Any, *rest: Any, **options: Any) -> Any:
        if watching:
            alive.append(sum(ref() is not None for ref in made))
        packed = pack(q, *rest, **options)
        if watching:
            made.append(weakref.ref(packed))
        return packed

    def told(stage: str, done: float) -> None:
        nonlocal watching
        watching = "layer" in stage

    monkeypatch.setattr(layer_errors.ops, "pack_experts", watched)
    compare(config(tmp_path), IDS, ["fp8", "ptpc_fp8"], ["auto"], window=WINDOW, tell=told)
    assert len(alive) > 3 * 2 * 2
    assert max(alive) <= 1, alive
