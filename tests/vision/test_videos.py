"""Videos against transformers' Qwen3-VL: which frames, their patches, the prompt; files of every kind, and damaged ones."""

from __future__ import annotations

import asyncio
import base64
import builtins
import io
import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from cases import cases
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast, image_processing_backends, video_processing_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import read_video_pyav
from vision.test_processors import QWEN, patches, torchvision_functions
from vision.tiny_tokenizer import SPECIAL, write_tokenizer

from octavo.errors import InvalidRequest, OctavoError, refusal
from octavo.vision import FetchRules, place_images
from octavo.vision.video import fetch_video, prepare_frames, prepare_video, video_parts, video_reader
from octavo.vision.video_decode import VideoLimits
from octavo.vision.video_placement import VideoTokens, place_videos
from octavo.vision.video_qwen import QwenVideos, VideoFrames

VIDEO: dict[str, Any] = {
    "size": {"longest_edge": 200_000, "shortest_edge": 4096}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.5], "max_frames": 12, "cap_pixels_per_frame": False,
}  # fmt: skip
CAPPED = VIDEO | {"cap_pixels_per_frame": True, "max_video_tokens": 12, "fps": 3.5, "min_frames": 2}
TOKENS = VideoTokens(SPECIAL["<|video_pad|>"], SPECIAL["<|vision_start|>"], SPECIAL["<|vision_end|>"])


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision, which is not installed, does for the processor by torch's own functions."""
    functions = torchvision_functions()
    resize = functions.resize
    functions.resize = lambda image, size, **how: resize(image.flatten(0, 1), size, **how).unflatten(0, image.shape[:2])
    functions.grayscale_to_rgb = lambda video: video
    functions.InterpolationMode = SimpleNamespace(LANCZOS="lanczos", BILINEAR="bilinear")
    monkeypatch.setattr(image_processing_backends, "tvF", functions, raising=False)
    monkeypatch.setattr(video_processing_utils, "tvF", functions, raising=False)
    monkeypatch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", {3: "bicubic"})


def check(found: VideoFrames, expected: Any, what: Any) -> None:
    """Grids are equal, and values but for a step of a byte in one of a hundred."""
    grids = [[len(found.images), *found.images[0].grid[1:]]]
    assert grids == expected["video_grid_thw"].tolist(), what
    assert {image.grid.frames for image in found.images} == {1}
    mine = np.concatenate([patches(image) for image in found.images])
    values = expected["pixel_values_videos"].numpy()
    assert mine.shape == values.shape, what
    off = np.abs(mine - values).reshape(len(mine), 3, -1).max(axis=(0, 2)) * 255 * VIDEO["image_std"]
    assert off.max() < 2.001, what
    assert np.count_nonzero(mine != values) <= 0.01 * values.size, what
    assert found.tokens == len(values) // 4


def clips(count: int) -> Iterator[tuple[NDArray[np.uint8], float]]:
    rng = np.random.default_rng(3)
    for number in range(count):
        frames, rows, columns = int(rng.integers(2, 60)), *(int(one) for one in np.exp(rng.uniform(1.7, 5.7, 2)))
        if number % 4 == 0:
            rows, columns = 64, 96  # no resizing, if the bounds let it
        yield rng.integers(0, 256, (frames, rows, columns, 3), dtype=np.uint8), float(rng.choice([1, 12.5, 24, 29.97, 60]))


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("config", [VIDEO, CAPPED], ids=["hub", "capped"])
def test_frames_are_those_of_transformers(config: dict[str, Any]) -> None:
    ours, theirs = QwenVideos.from_json(config), Qwen3VLVideoProcessor(**config)
    unchanged = 0
    for frames, fps in clips(40):
        metadata = [{"total_num_frames": len(frames), "fps": fps}]
        expected = theirs(videos=[frames], video_metadata=metadata, return_metadata=True, return_tensors="pt")
        found = prepare_frames(frames, ours, fps)
        assert ours.sample(len(frames), fps) == expected["video_metadata"][0].frames_indices.tolist()
        check(found, expected, (frames.shape, fps))
        if frames.shape[1:3] == (found.images[0].grid.rows * 16, found.images[0].grid.columns * 16):
            mine = np.concatenate([patches(image) for image in found.images])
            assert np.array_equal(mine, expected["pixel_values_videos"].numpy())
            unchanged += 1
    assert unchanged > 2


def test_equal_frames_alone_have_equal_digests() -> None:
    video = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    other = video.copy()
    other[7, 0, 0, 0] ^= 1
    found = [[image.digest for image in prepare_frames(one, QwenVideos(), 2.0).images] for one in (video, video, other)]
    assert found[0] == found[1]
    assert [a == b for a, b in zip(found[0], found[2], strict=True)] == [True, True, True, False]
    (single,) = prepare_frames(video[:1], QwenVideos(), 2.0).images  # which transformers refuses
    assert single.digest == prepare_frames(video[[0, 0]], QwenVideos(), 2.0).images[0].digest


def file_of(codec: str, kind: str, frames: int = 45, rate: int = 15, size: tuple[int, int] = (96, 128)) -> bytes:
    """A bar that moves over a color that changes."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(frames):
            pixels = np.full((*size, 3), (number * 5 % 256, 90, 200 - number % 200), np.uint8)
            pixels[:, number : number + 20] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


FILES = [("libx264", "mp4"), ("libx264", "mov"), ("libvpx-vp9", "webm"), ("libx264", "matroska"), ("mpeg4", "avi"),
         ("mjpeg", "avi")]  # fmt: skip


@pytest.mark.usefixtures("torchvision")
@cases(("codec", "kind"), FILES)
def test_files_are_read_as_transformers_reads_them(codec: str, kind: str) -> None:
    data = file_of(codec, kind)
    ours, theirs = QwenVideos.from_json(VIDEO), Qwen3VLVideoProcessor(**VIDEO)
    numbers = ours.sample(45, 15.0)
    assert numbers == [0, 9, 18, 26, 35, 44]
    pixels, metadata = read_video_pyav(io.BytesIO(data), lambda metadata: numbers)
    expected = theirs(videos=[pixels], do_sample_frames=False, return_tensors="pt")
    found = prepare_video("data:video/any;base64," + base64.b64encode(data).decode(), ours)
    assert metadata.fps == 15
    check(found, expected, (codec, kind))
    assert found.seconds == pytest.approx((0.3, 22 / 15, 79 / 30))


def turned(data: bytes, matrix: tuple[int, ...]) -> bytes:
    """An MP4 file whose track has another display matrix."""
    at = data.index(b"tkhd") + 4 + 40
    return data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :]


def test_a_phone_s_video_stands_upright() -> None:
    data, one = file_of("libx264", "mp4", frames=4), 1 << 16
    upright = prepare_video(data, QwenVideos()).images[0]
    for matrix in ((0, one, 0, -one, 0, 0, 0, 0, one << 14), (0, -one, 0, one, 0, 0, 0, 0, one << 14)):
        found = prepare_video(turned(data, matrix), QwenVideos()).images[0]
        assert (found.grid.rows, found.grid.columns) == (upright.grid.columns, upright.grid.rows)
    with av.open(io.BytesIO(data)) as container:
        pixels = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = prepare_frames([np.rot90(one) for one in pixels], QwenVideos(), 15.0)  # counterclockwise: the second matrix
    assert found.digest == expected.images[0].digest


def test_a_trimmed_video_begins_where_its_edit_list_says() -> None:
    """Its header counts the frames that are left out too."""
    data = file_of("libx264", "mp4")
    at = data.index(b"elst") + 12  # the edit's duration in milliseconds, and its start in 1/15360 s
    trimmed = data[:at] + struct.pack(">2I", 2333, struct.unpack(">I", data[at + 4 : at + 8])[0] + 10 * 1024) + data[at + 8 :]
    with av.open(io.BytesIO(data)) as container:
        pixels = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    found, expected = prepare_video(trimmed, QwenVideos()), prepare_frames(pixels[10:], QwenVideos(), 15.0)
    assert found.seconds == expected.seconds
    assert [image.digest for image in found.images] == [image.digest for image in expected.images]


@pytest.mark.usefixtures("torchvision")
def test_prompts_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare placeholder exactly; of one between start and end, as chat templates write it, the two go: the processor that the
    model came with did so, and later ones nest them.
    """
    write_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)  # it asks for torchvision
    theirs = Qwen3VLProcessor(Qwen2VLImageProcessorPil(**QWEN), tokenizer, Qwen3VLVideoProcessor(**VIDEO))
    first, second = (np.full((frames, 64, 96, 3), 7, np.uint8) for frames in (30, 7))
    picture = np.zeros((64, 300, 3), np.uint8)
    text = "a<|video_pad|>b<|image_pad|>c<|video_pad|><|image_pad|>"
    metadata = [{"total_num_frames": 30, "fps": 10.0}, {"total_num_frames": 7, "fps": 24.0}]
    expected = theirs(text=[text], images=[picture] * 2, videos=[first, second], video_metadata=metadata)
    images = [_image(tmp_path, picture)] * 2
    videos = [prepare_frames(first, QwenVideos.from_json(VIDEO), 10.0), prepare_frames(second, QwenVideos.from_json(VIDEO))]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def placed(text: str) -> tuple[list[int], Any]:
        ids, at = place_images(encode(text), images, SPECIAL["<|image_pad|>"])
        return place_videos(ids, videos, TOKENS, encode, at)

    ids, at = placed(text)
    assert ids == expected["input_ids"][0]
    kinds = torch.zeros(len(ids), dtype=torch.int64)
    for one in at:
        kinds[one.start : one.stop] = 2 if one.image.frames == 2 and one.image.pixels.shape[2] == 2 else 1
    assert kinds.tolist() == [int(kind) for kind in expected["mm_token_type_ids"][0]]
    assert [one.start for one in at] == sorted(one.start for one in at)
    assert placed(text.replace("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>"))[0] == ids
    with pytest.raises(InvalidRequest, match="has 2 videos and 1 places for them"):
        placed("<|video_pad|><|image_pad|><|image_pad|>")


def _image(directory: Path, picture: NDArray[np.uint8]) -> Any:
    from octavo.vision import image_processor

    (directory / "preprocessor_config.json").write_text(json.dumps(QWEN))
    return image_processor("qwen3_vl", directory)(picture)


SMALL = VideoLimits(bytes=100_000, seconds=5.0, frames=100, pixels=20_000)
CLIP = file_of("libx264", "mp4")


@cases(
    ("make", "sentence"),
    [
        (lambda: CLIP[: len(CLIP) // 2], "damaged or cut off"),
        (lambda: file_of("libx264", "matroska")[:300], "damaged or cut off|no pictures"),
        (lambda: b"", "of no format that is read here"),
        (lambda: b"GIF89a" + bytes(99), "of no format that is read here"),
        (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "of no format that is read here"),
        (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "of no format that is read here"),
        (lambda: CLIP + bytes(100_000), "more than 0 MiB"),
        (lambda: file_of("libx264", "mp4", frames=101, rate=60), "101 frames in 2 seconds; at most 100 frames"),
        (lambda: file_of("libx264", "mp4", frames=60, rate=10), "60 frames in 6 seconds; at most .* 5 seconds"),
        (lambda: file_of("libx264", "mp4", size=(200, 200)), "200 x 200 pixels; at most 20,000"),
        (lambda: file_of("libx264", "mp4", size=(2, 500)), "more than 200 times as long"),
        (lambda: file_of("msmpeg4", "avi"), r"codec \(msmpeg4\) is not read here"),
        (lambda: "data:video/mp4,x", "A video's data: URL should read data:video/mp4"),
    ],
)
def test_a_sentence_for_what_is_not_read(make: Callable[[], bytes | str], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        prepare_video(make(), QwenVideos(), SMALL)


def test_damaged_files_are_read_or_refused_in_a_sentence() -> None:
    rng, outcomes = random.Random(1), [0, 0]
    files = [file_of(codec, kind, frames=12) for codec, kind in FILES]
    for number in range(300):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.choice([1, 4, 30])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        said = refusal(lambda data=bytes(data): prepare_video(data, QwenVideos(), SMALL))
        assert said is None or re.fullmatch(r"An? .*\.", said), said
        outcomes[said is None] += 1
    assert min(outcomes) > 20


def test_without_pyav_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidRequest, match=r"pip install octavo\[video\]"):
        prepare_video(CLIP, QwenVideos())


def test_parts_of_chats_and_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(CLIP)
    data = "data:video/mp4;base64," + base64.b64encode(CLIP).decode()
    forms = [{"type": "video_url", "video_url": {"url": data}}, {"type": "video_url", "video_url": data},
             {"type": "video", "video": path.as_uri()}]  # fmt: skip
    parts = video_parts([{"role": "user", "content": [*forms, {"type": "text", "text": "x"}]}])
    assert [part.where for part in parts] == [f"messages.0.content.{place}" for place in range(3)]
    rules = FetchRules(local_path=tmp_path)
    found = [prepare_video(asyncio.run(fetch_video(part, rules)), QwenVideos()).images[1].digest for part in parts]
    assert len(set(found)) == 1
    with pytest.raises(InvalidRequest, match=r"video of messages\.0\.content\.2 cannot be fetched: .*allowed-local-media-path"):
        asyncio.run(fetch_video(parts[2], FetchRules()))
    with pytest.raises(InvalidRequest, match=r"messages\.0\.content\.0 should be like"):
        video_parts([{"role": "user", "content": [{"type": "video_url"}]}])
    with pytest.raises(InvalidRequest, match="may have 2 videos here"):
        video_parts([{"role": "user", "content": forms}], 2)

    def write(name: str, config: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(config))

    write("config.json", {"model_type": "qwen3_vl_moe", "video_token_id": 9})
    write("preprocessor_config.json", QWEN)
    reader = video_reader(tmp_path)
    assert reader is not None
    assert (reader.tokens, reader.processor.max_pixels) == ((9, 151652, 151653), 150_000)
    write("video_preprocessor_config.json", VIDEO)
    assert (reader := video_reader(tmp_path)) is not None
    assert reader.processor == QwenVideos.from_json(VIDEO)
    write("processor_config.json", {"video_processor": CAPPED})
    assert (reader := video_reader(tmp_path)) is not None
    assert reader.processor == QwenVideos.from_json(CAPPED)
    write("config.json", {"model_type": "kimi_k25"})
    assert video_reader(tmp_path) is None
    for wrong, sentence in [({"fps": "2"}, "fps must be a number over 0"), ({"num_frames": 8}, "num_frames must be None"),
                            ({"do_sample_frames": False}, "do_sample_frames must be True"),
                            ({"min_frames": 900}, "fewest pixels or frames")]:  # fmt: skip
        with pytest.raises(OctavoError, match=sentence):
            QwenVideos.from_json(wrong)
