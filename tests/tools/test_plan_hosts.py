"""Plans over hosts and pipeline stages: what a stage holds, which ways there are, what the link between hosts costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import cases
from tools.planner import answer, plan_of

from octavo.cli import engine_config, make_parser
from octavo.distributed import TensorParallel
from octavo.engine.pipeline import check_pipeline
from octavo.errors import OctavoError
from octavo.models import build_model
from octavo.server import serve
from octavo.stages import Stages
from octavo.tools.plan.explain import command, notes, refusals
from octavo.tools.plan.roofline import HOP_SECONDS, decode_rate, hop_seconds, prefill_rate
from octavo.tools.plan.splits import splits
from octavo.tools.plan.variants import deployment, fit_of

TWO = ("Llama-3.1-405B", "--accelerator", "h200", "--num-accelerators", "8", "--num-hosts", "2")


def test_stages_hold_the_model_together() -> None:
    """Weights and bytes of a token are those of one stage that has all layers; the fullest stage's memory is the answer."""
    plan = plan_of("Llama-3.1-70B", "--accelerator", "h200", "--num-accelerators", "4", "-tp", "2", "-pp", "2")
    subject, variant = plan.question.subject, plan.asked.variant
    whole = subject.walk(variant, 2).total("held")
    stages = [subject.walk(variant, 2, (number, 2)).total("held") for number in range(2)]
    assert sum(stages) == pytest.approx(whole)
    tokens = [sum(subject.token_bytes(variant, 2, (number, 2))) for number in range(2)]
    assert sum(tokens) == sum(subject.token_bytes(variant, 2))
    assert plan.asked.fit is not None
    assert plan.asked.fit.weights == pytest.approx(max(stages), rel=1e-4)  # the last has a norm more
    alone = fit_of(plan.question, variant, 2)
    assert alone is not None
    assert plan.asked.fit.tokens > 2 * alone.tokens


def test_the_roofline_of_stages_and_of_the_link_between_hosts() -> None:
    """One request gains nothing of stages but their messages; many have a step each. Layers split over hosts pay for them."""
    plan = plan_of(*TWO)
    q, variant = plan.question, plan.asked.variant
    one, two = (deployment(q, variant, 8, pp) for pp in (1, 2))
    assert hop_seconds(one, 64) == 0
    assert hop_seconds(two, 64) == pytest.approx(HOP_SECONDS + 64 * 4 * 16384 / 50e9)
    seconds = 1 / decode_rate(two, 1, 4096) - 1 / decode_rate(one, 1, 4096)
    assert seconds == pytest.approx(2 * hop_seconds(two, 1))
    assert decode_rate(one, 64, 4096) < decode_rate(two, 64, 4096) < 2 * decode_rate(one, 32, 4096)
    assert 1.8 < prefill_rate(two, 4096) / prefill_rate(one, 4096) < 2
    over_hosts = deployment(q, variant, 16, 1)
    assert over_hosts.on.link == 50e9
    assert prefill_rate(over_hosts, 4096) < prefill_rate(one, 4096)
    slow = deployment(replace(q, link=1e9), variant, 8, 2)
    assert decode_rate(slow, 64, 4096) < decode_rate(two, 64, 4096)


def test_ways_to_use_two_hosts() -> None:
    plan = plan_of(*TWO)
    found = {(one.tp, one.pp, one.replicas): one for one in splits(plan)}
    assert {(16, 1, 1), (8, 2, 1), (8, 1, 2), (4, 2, 2)} <= set(found)
    assert all(tp * pp * replicas == 16 for tp, pp, replicas in found)
    replicas, stages = (found[key].speed for key in ((8, 1, 2), (8, 2, 1)))
    assert replicas is not None
    assert stages is not None
    assert replicas.decode_many == pytest.approx(stages.decode_many, rel=0.05)
    assert splits(plan_of("Llama-3.1-8B", "--accelerator", "h200")) == []


def test_what_is_said() -> None:
    """The fewest stages on which it fits; the command of host 0; what there are too few accelerators for."""
    said = answer("DeepSeek-V3.2", "--accelerator", "h100", "--num-accelerators", "8", "--num-hosts", "2")
    assert (said["tensor_parallel_size"], said["pipeline_parallel_size"], said["num_hosts"]) == (8, 2, 2)
    assert said["fits"]
    assert said["splits"]
    plan = plan_of("DeepSeek-V3.2", "--accelerator", "h100", "--num-accelerators", "8", "--num-hosts", "2")
    assert command(plan, {}).endswith("-size 8 --pipeline-parallel-size 2 --nnodes 2 --node-rank 0 --master-addr HOST_0")
    said = answer("Llama-3.1-8B", "--accelerator", "h200", "-tp", "2", "-pp", "2")
    assert said["refused"] == [
        "--tensor-parallel-size 2 times --pipeline-parallel-size 2 needs 4 accelerators, and there is one."
    ]
    said = answer("Llama-3.1-8B", "--accelerator", "h200", "--num-accelerators", "64", "-tp", "1", "-pp", "33")
    assert any("--pipeline-parallel-size 33 splits the model's 32 layers" in text for text in said["refused"])


def test_stages_of_a_kind_that_was_not_run_are_told() -> None:
    """docs/hardware.md says which were."""
    eight = "Llama-3.1-8B", "--accelerator", "h200", "--num-accelerators", "8"
    for words, told in ((("-tp", "1", "-pp", "2"), False), (("-tp", "2", "-pp", "2"), True), (("-tp", "1", "-pp", "4"), True)):
        assert any(note.startswith("Of pipeline stages two were run") for note in answer(*eight, *words)["notes"]) == told


def test_stages_of_a_model_with_images_serve_text_alone() -> None:
    """The printed command is one that `octavo serve` takes, and no memory is kept for images; a plan of one stage keeps it."""
    on = "--accelerator", "h200", "--num-accelerators", "8", "--num-hosts", "2"
    chosen = "--accelerator", "h100", "--num-accelerators", "4", "-q", "bf16"
    for words in (("-tp", "8", "-pp", "2"), chosen, ("-pp", "2", "--language-model-only")):
        plan = plan_of("Qwen3-VL-235B-A22B" if words is chosen else "Kimi-K2.5", *on, *words)
        assert plan.question.pp == 2
        given = {"language_model_only": True} if "--language-model-only" in words else {}
        line = command(plan, given).split()
        assert line.count("--language-model-only") == 1
        config = engine_config(make_parser("serve", serve.add_arguments).parse_args(line[2:]))
        assert not config.reads_images
        model = build_model(plan.question.subject.source.config, TensorParallel(), 1, None, vision=config.reads_images)
        check_pipeline(model, TensorParallel(0, 8, stages=Stages(0, 2, 8)), ())
        assert plan.asked.fit is not None
        assert plan.asked.fit.images == 0
        assert any(note.startswith("Stages serve text alone: the vision tower is left out") for note in notes(plan))
        assert refusals(plan) == []
    plan = plan_of("Kimi-K2.5", *on, "-tp", "8")
    assert "--language-model-only" not in command(plan, {})
    assert plan.asked.fit is not None
    assert plan.asked.fit.images > 0


@cases(
    ("words", "verdict"),
    [
        (("--accelerator", "l40s", "--num-hosts", "2"), "It does not fit: "),
        ((*TWO[1:], "-tp", "3", "-pp", "2"), "It does not split over 6 accelerators."),
        ((*TWO[1:], "-tp", "8", "-pp", "3"), "There are too few accelerators: PTPC + FP8 KV on 24 x NVIDIA H200 SXM"),
        (("--accelerator", "h200", "--num-accelerators", "8", "-tp", "16"), "There are too few accelerators: "),
    ],
)
def test_what_does_not_fit_is_not_said_to_fit(words: tuple[str, ...], verdict: str) -> None:
    said = answer("Llama-3.1-405B", *words)
    assert said["verdict"].startswith(verdict)
    assert not said["fits"]
    assert said["refused"]
    assert not any("such servers fit" in note for note in said["notes"])


def test_a_link_between_hosts_needs_hosts() -> None:
    with pytest.raises(OctavoError, match="--host-link is for --num-hosts above 1"):
        plan_of("Llama-3.1-8B", "--accelerator", "h200", "--host-link", "25")
    assert plan_of(*TWO).question.link == 50e9
    assert plan_of(*TWO, "--host-link", "25").question.link == 25e9
