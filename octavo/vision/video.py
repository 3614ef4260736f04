"""Videos in: a file or frames -> groups of frames, each an image to the model. What waits and what computes is as for images:
`video_parts` -> `fetch_video` -> `prepare_video`, in a process of its own, -> `place_videos`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo import files
from octavo.errors import InvalidRequest
from octavo.images import VIDEO_PARTS
from octavo.vision.fetch import FetchRules, decode_data_url, fetch
from octavo.vision.parts import check_number, given_parts
from octavo.vision.patches import FILE, read_config
from octavo.vision.video_decode import VideoLimits, open_video
from octavo.vision.video_placement import VideoTokens
from octavo.vision.video_qwen import DEFAULT_FPS, QwenVideos, VideoFrames

__all__ = ["VideoPart", "VideoReader", "fetch_video", "prepare_frames", "prepare_video", "video_parts", "video_reader"]

_QWEN = ("qwen3_vl", "qwen3_vl_moe")  # config.json's model_type
_TOKENS = {"video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
_SECONDS = 60.0  # that fetching may take


class VideoReader(NamedTuple):
    """How a checkpoint's videos are prepared and placed, and what a chat template writes for one."""

    processor: QwenVideos
    tokens: VideoTokens
    text: str = "<|vision_start|><|video_pad|><|vision_end|>"


class VideoPart(NamedTuple):
    """url: or the frames themselves, from Python. where: its place in the request, such as messages.0.content.1."""

    url: Any
    where: str


def video_reader(directory: str | Path) -> VideoReader | None:
    """Of the checkpoint in `directory`; None for a model whose videos are not read. Raises OctavoError for configs that are
    wrong.
    """
    config = files.read_json(Path(directory) / "config.json") or {}
    if config.get("model_type") not in _QWEN:
        return None
    given = (config.get(name, default) for name, default in _TOKENS.items())
    tokens = [one if type(one) is int else default for one, default in zip(given, _TOKENS.values(), strict=True)]
    return VideoReader(QwenVideos.from_json(*_read_config(Path(directory))), VideoTokens(*tokens))


def _read_config(directory: Path) -> tuple[Mapping[str, Any], str]:
    """The config and its file. As transformers looks for it, which takes the images' for a checkpoint that has no other."""
    names = "processor_config.json", "video_preprocessor_config.json", FILE
    nested = (files.read_json(directory / names[0]) or {}).get("video_processor")
    if isinstance(nested, Mapping):
        return nested, names[0]
    own = files.read_json(directory / names[1])
    return (read_config(directory), names[2]) if own is None else (own, names[1])


def video_parts(messages: Sequence[Mapping[str, Any]], limit: int | None = None) -> list[VideoPart]:
    """The videos of a chat in their order, of parts as vLLM and transformers have them.

    Raises InvalidRequest for a part without a video, and for more than `limit`.
    """
    found = []
    for url, where in given_parts(messages, VIDEO_PARTS, VIDEO_PARTS):
        if url is None:
            raise InvalidRequest(f"{where} should be like {{'type': 'video_url', 'video_url': {{'url': ...}}}}.", where)
        found.append(VideoPart(url, where))
    check_number(len(found), limit, "videos")
    return found


async def fetch_video(part: VideoPart, rules: FetchRules) -> bytes | str:
    """The file that a part names, within the limits of a video; a data: URL stays as it is, since decoding it computes.

    Raises InvalidRequest, one sentence, for what may not or cannot be fetched.
    """
    if not isinstance(part.url, str):
        raise InvalidRequest(f"{part.where} should have the video's URL.", part.where)
    if part.url[:5].lower() == "data:":
        return part.url
    try:
        return await fetch(part.url, replace(rules, max_bytes=VideoLimits().bytes, seconds=_SECONDS))
    except InvalidRequest as error:
        raise InvalidRequest(f"The video of {part.where} cannot be fetched: {error}", part.where) from None


def prepare_video(source: bytes | str, processor: QwenVideos, limits: VideoLimits | None = None) -> VideoFrames:
    """What a model reads of a video, of its file or data: URL. Raises InvalidRequest, one sentence, for what is no video that
    can be read.
    """
    limits = limits or VideoLimits()
    data = _decoded(source, limits) if isinstance(source, str) else source
    with open_video(data, limits) as video:
        numbers = processor.sample(video.frames, video.fps)
        return processor(video.read(numbers), numbers, video.fps)


def _decoded(url: str, limits: VideoLimits) -> bytes:
    try:
        return decode_data_url(url, limits.bytes)
    except InvalidRequest:
        raise InvalidRequest(
            "A video's data: URL should read data:video/mp4;base64, followed by the file in base64, which has at most "
            f"{limits.bytes >> 20} MiB."
        ) from None


def prepare_frames(
    frames: Sequence[NDArray[np.uint8]], processor: QwenVideos, fps: float | None = None, numbers: Sequence[int] | None = None
) -> VideoFrames:
    """What a model reads of frames in memory, RGB [rows, columns, 3], of `fps` a second; where that is not known, of 24, as in
    transformers. `numbers`: of frames that were chosen already, their places in the whole video.

    Raises InvalidRequest for values that cannot be.
    """
    try:
        fps = DEFAULT_FPS if fps is None else float(fps)
    except (TypeError, ValueError):
        raise InvalidRequest("A video's fps must be a number.") from None
    if not len(frames) or not 0 < fps < float("inf") or (numbers is not None and len(numbers) != len(frames)):
        raise InvalidRequest("A video of frames needs one at least, an fps over 0, and a number for each frame if for any.")
    if numbers is not None:
        return processor(frames, numbers, fps)
    chosen = processor.sample(len(frames), fps)
    return processor([frames[number] for number in chosen], chosen, fps)
