"""The whole engine on tiny models of text and images: each picture has its answer, whatever company and parts it comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.books import check_images
from engine.test_core import LENGTH, run, token_ids
from models.test_kimi import kimi, write
from models.test_qwen3_vl import qwen3_vl
from transformers import PreTrainedModel

from octavo.config import EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.encoder_cache import EncoderCache
from octavo.engine.memory import CacheBudget, plan_blocks
from octavo.engine.scheduler import IMAGE_TOKENS, Scheduler
from octavo.images import Grid, ImagePatches
from octavo.layers.vision import patch_values
from octavo.messages import EngineRequest, SamplingParams
from octavo.vision.patches import digest
from octavo.vision.placement import place_images

IMAGE = 250
ENGINE: dict[str, Any] = dict(dtype="float32", device="cpu", threads=1, block_size=4, max_model_len=LENGTH)
SIDES = {"qwen3_vl": (4, 2), "kimi_k25": (14, 1)}  # a patch's side, and frames


def image(family: str, seed: int, rows: int = 4, columns: int = 6) -> ImagePatches:
    side, frames = SIDES[family]
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * columns, 3, 1, side * side), dtype=np.uint8)
    values = np.linspace([-1, -1.5, -2], [1, 1.5, 2], 256, dtype=np.float32).T.copy()
    return ImagePatches(pixels, values, frames, Grid(1, rows, columns), rows * columns // 4, digest(pixels))


def prompt(name: str, ids: list[int], *images: ImagePatches, **params: Any) -> EngineRequest:
    """`ids` with one IMAGE for each image."""
    placed, at = place_images(ids, images, IMAGE)
    return EngineRequest(name, placed, SamplingParams(**{"max_tokens": 12, "temperature": 0} | params), images=at)


Saved = dict[str, tuple[PreTrainedModel, Path]]


def save(family: str, path: Path, model: PreTrainedModel) -> None:
    if family == "kimi_k25":
        write(path, model, int4=False)
    else:
        model.save_pretrained(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    found: Saved = {}
    for family, make in {"qwen3_vl": qwen3_vl, "kimi_k25": kimi}.items():
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(family)
        model = make()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(3 if family == "qwen3_vl" and p.ndim > 1 and "layers" in name else 1)
        save(family, path, model)
        found[family] = model, path
    return found


@pytest.fixture
def make(saved: Saved) -> Callable[..., EngineCore]:
    def core(family: str, blocks: int | None = None, room: int | None = None, **options: Any) -> EngineCore:
        made = EngineCore(EngineConfig(model=str(saved[family][1]), **ENGINE | options))
        assert made.runner.encoder is not None
        if blocks is not None or room is not None:
            pool = made.scheduler.pool if blocks is None else BlockPool(blocks, 4, made.scheduler.pool.prefix_caching)
            cache = EncoderCache(room or made.runner.encoder.capacity)
            made.scheduler = Scheduler(pool, 256, made.runner.max_num_batched_tokens, LENGTH, cache)
        return made

    return core


def logits(family: str, model: PreTrainedModel, asked: EngineRequest, ids: list[int]) -> torch.Tensor:
    """transformers', [len(ids), vocab], of the request's prompt and what follows it."""
    patches = [
        patch_values(torch.from_numpy(p.image.pixels), torch.from_numpy(p.image.values), p.image.frames) for p in asked.images
    ]
    more: dict[str, Any] = {}
    if patches:
        shape = (-1, 3, 14, 14) if family == "kimi_k25" else (-1, 96)
        more = dict(
            pixel_values=torch.cat(patches).view(shape), image_grid_thw=torch.tensor([p.image.grid for p in asked.images])
        )
        if family != "kimi_k25":
            kinds = torch.zeros(1, len(ids), dtype=torch.int64)
            for placed in asked.images:
                kinds[0, placed.start : placed.stop] = 1
            more["mm_token_type_ids"] = kinds
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids]), **more).logits[0]
    return found


def greedy(family: str, model: PreTrainedModel, asked: EngineRequest) -> list[int]:
    """What transformers says, one forward pass over everything a token."""
    ids = list(asked.prompt_token_ids)
    for _ in range(asked.params.max_tokens or 0):
        ids.append(int(logits(family, model, asked, ids)[-1].argmax()))
    return ids[len(asked.prompt_token_ids) :]


def requests(family: str) -> list[EngineRequest]:
    """Texts, pictures, the same text with another picture, the same picture in another text, several pictures."""
    a, b, c = image(family, 1), image(family, 2), image(family, 3, 2, 8)
    text = [10, 11, IMAGE, 12, 13]
    return [
        prompt("a", text, a),
        prompt("b", text, b),
        prompt("text", [20, 21, 22, 23, 24, 25]),
        prompt("abc", [30, IMAGE, 36, IMAGE, 31, 32, 33, 34, IMAGE, 35], a, b, c),
        prompt("later", [40, 41, 42, 43, 44, 45, 46, IMAGE, 47, 48], b),
        prompt("last", [50, 51, IMAGE], c),
        prompt("alone", [IMAGE], a),
    ]


@pytest.mark.parametrize("family", SIDES)
def test_the_engine_says_what_transformers_says_alone_and_in_company(family: str, saved: Saved, make: Any) -> None:
    asked = requests(family)
    expected = {one.request_id: greedy(family, saved[family][0], one) for one in asked}
    assert expected["a"] != expected["b"]
    assert len({token for ids in expected.values() for token in ids}) > 12, "outputs too dull to tell a mistake by"
    core = make(family)
    for one in asked:
        assert token_ids(run(core, [one])[0]) == {one.request_id: expected[one.request_id]}
    assert token_ids(run(make(family), asked)[0]) == expected
    assert token_ids(run(make(family, max_num_batched_tokens=5), asked, apart=2)[0]) == expected  # in parts that cut images
    assert token_ids(run(make(family, room=6), asked)[0]) == expected  # of two images one is always evicted
    preempted, sums = run(make(family, blocks=12), asked)
    assert token_ids(preempted) == expected
    assert sums.num_preemptions
    ahead = make(family, room=6, max_num_batched_tokens=5, enforce_eager=True)
    ahead.depth = 2  # a step is launched before the tokens of the one before are read
    ahead.add(asked[3])
    ahead.step()
    ahead.abort("abc")  # two steps with its images are in flight, or one
    assert token_ids(run(ahead, asked)[0]) == expected
    check_images(ahead.scheduler.encoder_cache, ahead.runner.encoder.features, [])
    assert ahead.scheduler.encoder_cache.held == 0


@pytest.mark.parametrize("family", SIDES)
def test_images_after_a_sleep_and_a_reload_and_without_a_cache(family: str, saved: Saved, make: Any) -> None:
    core, asked = make(family, mm_processor_cache_gb=0, max_model_len=40), requests(family)[:3]
    assert (core.info.image_tokens, core.runner.encoder.capacity) == (40, 40)  # an image of a prompt's length always has room
    first = token_ids(run(core, asked)[0])
    for change in (lambda: (core.sleep(), core.wake()), lambda: core.reload(str(saved[family][1]))):
        change()
        assert not core.runner.encoder.features, "features of other weights, perhaps"
        assert token_ids(run(core, asked)[0]) == first


def test_memory_for_images_is_planned(saved: Saved, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []  # working bytes of a plan, and what images take of them

    def noted(*given: Any) -> CacheBudget:
        asked.append((given[5], given[8]))
        return plan_blocks(*given)

    monkeypatch.setattr("octavo.engine.model_lifecycle.plan_blocks", noted)
    encoder = make("qwen3_vl", max_model_len=LENGTH, mm_processor_cache_gb=0.5).runner.encoder
    EngineCore(EngineConfig(model=str(saved["qwen3_vl"][1]), language_model_only=True, **ENGINE))
    (working, images), (text, none) = asked
    assert (working - text, none) == (images, 0)
    kept, token = 2**29, encoder.model.feature_width * 4
    assert encoder.capacity == kept // token
    assert encoder.largest == LENGTH  # what one image may have, whatever the cache holds: the tower's memory is bounded
    at_once = max(LENGTH, IMAGE_TOKENS)
    assert images == kept // token * token + 2 * 512 * token + encoder.model.encoder_workspace_bytes(at_once, torch.float32)


@pytest.mark.parametrize("family", SIDES)
def test_log_probabilities_of_a_prompt_with_images(family: str, saved: Saved, make: Any) -> None:
    asked = [replace(one, params=replace(one.params, prompt_logprobs=0, max_tokens=1)) for one in requests(family)]
    for outputs in (run(make(family), asked)[0], run(make(family, max_num_batched_tokens=5, room=6), asked)[0]):
        for one in asked:
            ids = list(one.prompt_token_ids)
            expected = logits(family, saved[family][0], one, ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            found = [entry for output in outputs[one.request_id] for entry in output.prompt_logprobs or ()]
            assert found[0] is None
            actual = torch.tensor([entry[0].logprob for entry in found[1:] if entry is not None])
            assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("family", SIDES)
def test_equal_pictures_are_encoded_once_and_share_their_prefix(family: str, make: Any) -> None:
    core = make(family)
    encoded: list[list[Grid]] = []
    begin = core.runner.model.encoder_input
    core.runner.encoder.model.encoder_input = lambda patches, grids: encoded.append(grids) or begin(patches, grids)
    asked = requests(family)
    first, sums = run(core, [asked[0]])
    assert (sums.prefix_cache_hits, sums.image_queries, sums.image_hits) == (0, 1, 0)
    again, sums = run(core, [asked[0]])
    assert token_ids(again) == token_ids(first)
    assert sums.prefix_cache_hits == 8  # two blocks of four: 10, 11 and the six tokens of the image
    assert len(encoded) == 1
    _, sums = run(core, [asked[1]])
    assert sums.prefix_cache_hits == 0, "another picture in the same words"
    assert len(encoded) == 2
    _, sums = run(core, [asked[4]])
    assert len(encoded) == 2, "a picture of an earlier request"
    assert (sums.image_queries, sums.image_hits) == (1, 1)
    salted = replace(asked[0], cache_salt="mine")
    _, sums = run(core, [salted])
    assert sums.prefix_cache_hits == 0
    assert len(encoded) == 3, "salts share nothing, so that nobody can tell what others have sent"


def test_a_placeholder_in_a_text_is_a_token_like_others(saved: Saved, make: Any) -> None:
    one = EngineRequest("plain", [10, IMAGE, 11, IMAGE], SamplingParams(max_tokens=5, temperature=0))
    mixed = requests("qwen3_vl")[:1]
    core = make("qwen3_vl")
    alone = token_ids(run(core, [one])[0])["plain"]
    assert token_ids(run(make("qwen3_vl"), [one, *mixed])[0])["plain"] == alone


def test_an_image_larger_than_the_cache_fails_alone(make: Any) -> None:
    core = make("qwen3_vl", room=5)
    outputs, _ = run(core, [requests("qwen3_vl")[0], prompt("text", [20, 21])])
    assert [o.error for o in outputs["a"]] == [
        "An image has 6 tokens, and 5 fit into the encoder cache (--mm-processor-cache-gb)."
    ]
    assert len(token_ids({"text": outputs["text"]})["text"]) == 12


def test_a_request_that_starts_with_an_image_in_parts_is_counted(make: Any) -> None:
    """Beside the last token of another, on the device: there is no step then, as the image is not encoded yet."""
    core = make("qwen3_vl")
    core.depth, core.scheduler.image_tokens = 2, 2
    core.add(prompt("text", [20, 21, 22], max_tokens=2))
    found = [core.step()[1]]
    core.add(prompt("large", [IMAGE, 12, 13], image("qwen3_vl", 5, 6, 8)))
    while core.has_work():
        found.append(core.step()[1])
    assert [name for stats in found for name in stats.scheduled_first] == ["text", "large"]
    assert sum(stats.prefix_cache_queries for stats in found) == 3 + 2 + 12


@pytest.mark.parametrize("family", SIDES)
def test_an_image_encoded_in_parts_is_the_same(family: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 tokens, two a step; a request of text goes on meanwhile, and an aborted image leaves nothing."""
    large = image(family, 5, 6, 8)
    asked = prompt("large", [10, 11, IMAGE, 12, 13], large)
    whole = token_ids(run(make(family), [asked])[0])
    core = make(family)
    core.scheduler.image_tokens = 2
    core.add(prompt("text", [20, 21, 22], max_tokens=40))
    core.step()
    core.add(asked)
    parts: list[int] = []
    encode = core.runner.encoder.run
    monkeypatch.setattr(core.runner.encoder, "run", lambda given, evicted: parts.append(len(given)) or encode(given, evicted))
    said: list[str] = []
    while core.scheduler.has_work and "large" not in said:
        said += [output.request_id for output in core.step()[0]]
    assert parts[:6] == [1] * 6
    assert said[:5] == ["text"] * 5, "text waits for no picture"
    assert core.runner.encoder._begun == {}
    while core.has_work():
        core.step()
    assert token_ids(run(core, [asked])[0]) == whole
    other = prompt("other", [10, IMAGE], image(family, 6, 6, 8))
    core.add(other)
    core.step()
    assert len(core.runner.encoder._begun) == 1
    core.abort("other")
    assert core.runner.encoder._begun == {}, "whether or not a step follows"
    assert token_ids(run(core, [asked])[0]) == whole
