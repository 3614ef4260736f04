"""Images in LLM: generate against transformers on tiny models, every kind of picture, and a sentence for what is none."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import cases
from engine.test_images import ENGINE, IMAGE, Saved, greedy, save, saved  # noqa: F401 (a fixture)
from frontend.test_llm import FakeCore
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import PreTrainedModel
from transformers.image_transforms import convert_to_rgb
from vision.test_videos import file_of
from vision.tiny_tokenizer import SPECIAL, write_tokenizer

from octavo.engine import worker
from octavo.errors import InvalidRequest, OctavoError
from octavo.frontend.llm import LLM
from octavo.images import ImagePatches
from octavo.layers.vision import patch_values
from octavo.messages import EngineInfo, EngineRequest, SamplingParams
from octavo.vision import VideoFrames, image_reader, place_images, prepare_frames, prepare_video, video_reader

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
VIDEO = {**SIZES, "size": {"shortest_edge": 1024, "longest_edge": 4096}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN = {**SIZES, "min_pixels": 256, "max_pixels": 1024}
KIMI = {"media_proc_cfg": {"in_patch_limit": 24, "patch_size": 14, "merge_kernel_size": 2, "patch_limit_on_one_side": 12}}


def picture(rows: int, columns: int, seed: int = 0, channels: int = 3, dtype: Any = np.uint8) -> NDArray[Any]:
    shape = (rows, columns, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture(scope="module")
def readable(saved: Saved) -> Saved:  # noqa: F811
    for family, config in {"qwen3_vl": QWEN, "kimi_k25": KIMI}.items():
        model, path = saved[family]
        with torch.no_grad():
            model.lm_head.weight[list(SPECIAL.values())] = 0  # nobody answers with the token of an image
        save(family, path, model)
        (path / "preprocessor_config.json").write_text(json.dumps(config))
        (path / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
        write_tokenizer(path)
    return saved


@pytest.mark.parametrize("family", ["qwen3_vl", "kimi_k25"])
def test_generate_says_what_transformers_says(family: str, readable: Saved) -> None:
    """In one batch: text, a picture, another in the same words, two, arrays among token ids; two pictures, two answers."""
    model, path = readable[family]
    llm = LLM(path, **ENGINE)
    a, b, c = picture(30, 41, 41), picture(30, 41, 2), picture(18, 50, 3)
    ids = [60, 61, IMAGE, 62]
    given: list[tuple[Any, list[NDArray[np.uint8]]]] = [
        ({"prompt": "text alone"}, []),
        ({"prompt": f"{PLACE}what", "multi_modal_data": {"image": Image.fromarray(a)}}, [a]),
        ({"prompt": f"{PLACE}what", "multi_modal_data": {"image": Image.fromarray(b)}}, [b]),
        ({"prompt": f"x{PLACE}y{PLACE}", "multi_modal_data": {"image": [Image.fromarray(c), a]}}, [c, a]),
        ({"prompt_token_ids": ids, "multi_modal_data": {"image": b}}, [b]),
        ({"prompt_token_ids": [IMAGE, *ids], "multi_modal_data": {"image": np.stack([a, b])}}, [a, b]),
        ({"prompt": "more", "multi_modal_data": {"image": None}}, []),
    ]
    found = llm.generate([prompt for prompt, _ in given], GREEDY)
    reader = image_reader(path)
    assert reader is not None
    for result, (prompt, pixels) in zip(found, given, strict=True):
        bare = prompt.get("prompt_token_ids") or llm.encode(prompt["prompt"])
        expanded, placed = place_images(bare, [reader.processor(one) for one in pixels], IMAGE)
        assert result.prompt_token_ids == expanded
        expected = greedy(family, model, EngineRequest("", expanded, GREEDY, images=placed))
        assert result.outputs[0].token_ids == expected, prompt
    assert found[1].outputs[0].token_ids != found[2].outputs[0].token_ids


TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
CLIP_PLACE = "<|vision_start|><|video_pad|><|vision_end|>"


def answer(
    model: PreTrainedModel, prompt: list[int], images: Sequence[ImagePatches], videos: Sequence[VideoFrames]
) -> list[int]:
    """What transformers says, one forward pass over everything a token."""

    def values(patches: Sequence[ImagePatches]) -> torch.Tensor:
        listed = [patch_values(torch.from_numpy(one.pixels), torch.from_numpy(one.values), one.frames) for one in patches]
        return torch.cat(listed).view(-1, 96)

    more: dict[str, torch.Tensor] = {}
    if images:
        more |= dict(pixel_values=values(images), image_grid_thw=torch.tensor([one.grid for one in images]))
    more["pixel_values_videos"] = values([one for video in videos for one in video.images])
    more["video_grid_thw"] = torch.tensor([[len(video.images), *video.images[0].grid[1:]] for video in videos])
    ids = list(prompt)
    for _ in range(GREEDY.max_tokens or 0):
        kinds = [[1 if one == IMAGE else 2 if one == SPECIAL["<|video_pad|>"] else 0 for one in ids]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), mm_token_type_ids=torch.tensor(kinds), **more).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generate_and_chat_say_of_videos_what_transformers_says(readable: Saved) -> None:
    """Frames as an array and as pictures, with a clock and without; two videos, two answers; beside images; a file."""
    model, path = readable["qwen3_vl"]
    llm = LLM(path, **ENGINE | {"max_model_len": 400})
    frames, others = (np.stack([picture(16, 24, seed + number) for number in range(7)]) for seed in (50, 70))
    data = file_of("libx264", "mp4", frames=10, rate=5, size=(32, 48))
    reader, still = video_reader(path), picture(18, 50, 3)
    images = image_reader(path)
    assert reader is not None
    assert images is not None
    p = reader.processor
    clips = [prepare_frames(frames, p), prepare_frames(others, p), prepare_frames(frames, p, 2.0), prepare_video(data, p)]
    chosen = prepare_frames(frames[:3], p, 10.0, [4, 9, 20])
    clock = {"fps": 10, "frames_indices": [4, 9, 20], "do_sample_frames": False, "total_num_frames": 30}
    listed = [Image.fromarray(one) for one in frames]
    given: list[tuple[str, dict[str, Any], list[VideoFrames]]] = [
        (f"{CLIP_PLACE}what", {"video": frames}, [clips[0]]),
        (f"{CLIP_PLACE}what", {"video": others}, [clips[1]]),
        (f"{CLIP_PLACE}what", {"video": listed}, [clips[0]]),
        (f"a{CLIP_PLACE}b{CLIP_PLACE}", {"video": [(listed, {"fps": 2.0}), others]}, [clips[2], clips[1]]),
        (f"a{CLIP_PLACE}b", {"video": (frames[:3], clock)}, [chosen]),
        (f"{PLACE}x{CLIP_PLACE}y{PLACE}", {"video": [frames], "image": [still, still]}, [clips[0]]),
    ]
    found = llm.generate([{"prompt": text, "multi_modal_data": media} for text, media, _ in given], GREEDY)
    template = TEMPLATE.replace("{% else %}", "{% elif p.type == 'video' %}" + CLIP_PLACE + "{% else %}")
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    parts: list[list[dict[str, Any]]] = [
        [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "what"}],
        [{"type": "image", "image": still}, {"type": "video", "video": frames}, {"type": "image_pil", "image_pil": listed[0]}],
    ]
    found += llm.chat([[{"role": "user", "content": one}] for one in parts], GREEDY, chat_template=template)
    given += [("", {}, [clips[3]]), ("", {"image": [still, frames[0]]}, [clips[0]])]
    for result, (text, media, videos) in zip(found, given, strict=True):
        pictures = [images.processor(one) for one in media.get("image", ())]
        assert result.prompt_token_ids.count(IMAGE) == sum(one.tokens for one in pictures)
        assert result.prompt_token_ids.count(SPECIAL["<|video_pad|>"]) == sum(video.tokens for video in videos)
        assert result.outputs[0].token_ids == answer(model, result.prompt_token_ids, pictures, videos), (text, media)
    answers = [result.outputs[0].token_ids for result in found]
    assert answers[0] == answers[2] != answers[1]
    assert "a<0.7 seconds><|vision_start|>" in llm.get_tokenizer().decode(found[4].prompt_token_ids, skip_special_tokens=False)


class Recorder(FakeCore):
    """Keeps the images of every request."""

    def __init__(self, config: Any, progress: Callable[[str, float], None]):
        super().__init__(config, progress)
        self.info = EngineInfo(400, 4096, 10, 16, "fake", image_tokens=0 if config.language_model_only else 12)
        self.images: list[ImagePatches] = []

    def add(self, *requests: EngineRequest) -> None:
        super().add(*requests)
        self.images += [placed.image for placed in requests[0].images]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    tokens = {"image_token_id": IMAGE, "video_token_id": SPECIAL["<|video_pad|>"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **tokens}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN))
    write_tokenizer(tmp_path)
    monkeypatch.setattr(worker, "engine_core", Recorder)
    return lambda **options: LLM(tmp_path, **options)


def test_pictures_of_every_mode_are_read_as_transformers_converts_them(make: Callable[..., Any], tmp_path: Path) -> None:
    colors, alpha = Image.fromarray(picture(20, 24)), Image.fromarray(picture(20, 24, channels=4))
    palette = colors.quantize(17)
    exif = Image.Exif()
    exif[0x0112] = 6
    colors.save(tmp_path / "turned.jpg", exif=exif)
    palette.save(tmp_path / "clear.png", transparency=3)
    pictures = [
        colors, alpha, palette, Image.open(tmp_path / "turned.jpg"), Image.open(tmp_path / "clear.png"), colors.resize((1, 1)),
        *(colors.convert(mode) for mode in ("L", "1", "CMYK", "YCbCr", "HSV")), alpha.convert("LA"),
    ]  # fmt: skip
    deep = picture(20, 24, channels=1, dtype=np.uint16)
    expected = [convert_to_rgb(ImageOps.exif_transpose(one), return_numpy=True) for one in pictures]
    expected.append(np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))
    llm = make()
    prompts = [{"prompt": PLACE, "multi_modal_data": {"image": one}} for one in [*pictures, Image.fromarray(deep)]]
    llm.generate(prompts * 2, GREEDY)
    reader = image_reader(tmp_path)
    assert reader is not None
    assert len(llm._core.images) == 2 * len(expected)
    for found, pixels in zip(llm._core.images, expected * 2, strict=True):
        wanted = reader.processor(np.ascontiguousarray(pixels))
        assert (found.grid, found.digest) == (wanted.grid, wanted.digest)
        assert np.array_equal(found.pixels, wanted.pixels)


@cases(
    ("data", "prompt", "options", "sentence"),
    [
        ({"image": picture(9, 9)}, "none", {}, r"has 1 images and 0 places for them \(token 250\)"),
        ({"image": picture(9, 9)}, PLACE * 2, {}, "has 1 images and 2 places"),
        ({"image": [picture(9, 9)] * 3}, PLACE * 3, {"limit_mm_per_prompt": {"image": 2}}, "may have 2 images here"),
        ({"image": picture(9, 9)}, PLACE, {"language_model_only": True}, "switched off here"),
        ({"image": "picture.png"}, PLACE, {}, "An image must be of PIL, or a numpy array uint8 .*, not str"),
        ({"image": picture(9, 9) / 255}, PLACE, {}, r"not an array float64 \[9, 9, 3\]"),
        ({"image": picture(9, 9)[..., 0]}, PLACE, {}, r"not an array uint8 \[9, 9\]"),
        ({"image": picture(0, 9)}, PLACE, {}, r"not an array uint8 \[0, 9, 3\]"),
        ({"image": Image.new("RGB", (0, 4))}, PLACE, {}, "no pixels"),
        ({"image": Image.new("RGB", (9000, 9000))}, PLACE, {}, "9000 x 9000 pixels; at most"),
        ({"image": Image.new("F", (9, 9))}, PLACE, {}, "pixels of 32 bits"),
        ({"image": picture(201, 1)}, PLACE, {}, "more than 200 times as long"),
        ({"image": picture(300, 300)}, PLACE, {}, "An image has 16 tokens, and at most 12 are read here"),
        ({"video": picture(9, 9)}, CLIP_PLACE, {}, r"A video must be a list of images, .* not an array uint8 \[9, 9, 3\]"),
        ({"video": "a.mp4"}, CLIP_PLACE, {}, "A video must be a list of images, .* not str"),
        ({"video": ([picture(9, 9)], {"rate": 3})}, CLIP_PLACE, {}, "A video's 'rate' is not known"),
        ({"video": ([picture(9, 9)], {"fps": 0})}, CLIP_PLACE, {}, "an fps over 0"),
        ({"video": [picture(9, 9)]}, CLIP_PLACE * 2, {}, "has 1 videos and 2 places"),
        ({"video": [[picture(9, 9)]] * 2}, CLIP_PLACE * 2, {"limit_mm_per_prompt": {"video": 1}}, "may have 1 videos here"),
        ({"video": [picture(9, 9)]}, CLIP_PLACE, {"language_model_only": True}, "switched off here"),
        ({"audio": b""}, PLACE, {}, "multi_modal_data has 'audio', and only images and videos"),
        (picture(9, 9), PLACE, {}, "multi_modal_data must be like"),
    ],
)
def test_a_sentence_for_what_is_not_read(
    make: Callable[..., Any], data: Any, prompt: str, options: dict[str, Any], sentence: str
) -> None:
    """The engine is idle after it."""
    llm = make(**options)
    with pytest.raises(InvalidRequest, match=sentence):
        llm.generate(["text", {"prompt": prompt, "multi_modal_data": data}], GREEDY)
    assert not llm._core.running
    assert llm.generate("text", GREEDY)[0].finished


def test_models_without_images(make: Callable[..., Any], tmp_path: Path) -> None:
    asked = {"prompt": PLACE, "multi_modal_data": {"image": picture(9, 9)}}
    (tmp_path / "preprocessor_config.json").unlink()
    llm = make()
    assert llm.generate("text", GREEDY)[0].finished
    with pytest.raises(OctavoError, match=r"preprocessor_config\.json is missing"):
        llm.generate(asked, GREEDY)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InvalidRequest, match="reads text alone; leave images out"):
        make().generate(asked, GREEDY)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(KIMI))
    with pytest.raises(InvalidRequest, match=r"videos are not read here; send some of the frames as images\."):
        make().generate({"prompt": CLIP_PLACE, "multi_modal_data": {"video": [picture(9, 9)]}}, GREEDY)
    with pytest.raises(OctavoError, match="allowed_local_media_path must be a directory"):
        make(allowed_local_media_path=str(tmp_path / "no"))


def test_a_chat_reads_pictures_in_every_form(make: Callable[..., Any], tmp_path: Path) -> None:
    """A template of strings has the model's own text for an image."""
    first, second = Image.fromarray(picture(20, 24, 1)), Image.fromarray(picture(24, 20, 2))
    first.save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    forms: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": (tmp_path / "a.png").as_uri()}}, {"type": "image_pil", "image_pil": first},
        {"type": "image", "image": first}, {"type": "image", "image": np.asarray(first)},
    ]  # fmt: skip
    text = {"type": "text", "text": "or"}
    chats = [[{"role": "user", "content": [form, text, {"type": "image_pil", "image_pil": second}]}] for form in forms]
    strings = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for template, prompt in {TEMPLATE: f"{PLACE}or{PLACE}", strings: f"{PLACE}\nor\n{PLACE}"}.items():
        llm = make(allowed_local_media_path=str(tmp_path))
        results = llm.chat(chats, GREEDY, chat_template=template)
        assert {result.prompt for result in results} == {prompt}
        assert len({tuple(result.prompt_token_ids) for result in results}) == 1
        reader = image_reader(tmp_path)
        assert reader is not None
        wanted = [reader.processor(np.asarray(one)).digest for one in (first, second)]
        assert [image.digest for image in llm._core.images] == wanted * len(forms)
    assert llm.chat([{"role": "user", "content": "text"}], GREEDY, chat_template=strings)[0].finished

    async def notebook() -> None:
        assert llm.chat(chats[2], GREEDY, chat_template=strings)[0].finished

    asyncio.run(notebook())
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (forms[2], {}, "allowed_local_media_path"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}, {}, "no public address"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, {}, "should begin with data:"),
        ({"type": "image", "image": [first]}, {}, r"messages\.0\.content\.1 should be like"),
        ({"type": "image", "image": picture(9, 9) / 255}, {}, "not an array float64"),
        (forms[0], {"limit_mm_per_prompt": {"image": 0, "video": 1}}, "may have 0 images here"),
        (forms[0], {"language_model_only": True}, r"switched off here .*language_model_only"),
    ]
    for form, options, sentence in refused:
        with pytest.raises(InvalidRequest, match=sentence):
            make(**options).chat([{"role": "user", "content": [text, form]}], GREEDY, chat_template=TEMPLATE)
    with pytest.raises(InvalidRequest, match="has 1 images and 0 places"):
        make().chat([{"role": "user", "content": [forms[0]]}], GREEDY, chat_template="no pictures{{ messages[0].role }}")
