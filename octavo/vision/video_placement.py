"""Where the frames of a prompt's videos stand: a chat template writes one placeholder token a video, which becomes the time of
each group of frames as text, and its tokens between those that begin and end an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from octavo.images import PlacedImage
from octavo.vision.placement import find_places
from octavo.vision.video_qwen import VideoFrames

__all__ = ["VideoTokens", "place_videos"]


class VideoTokens(NamedTuple):
    """placeholder: for a video in a prompt, and then for each of its tokens. start, end: around those of a group of frames."""

    placeholder: int
    start: int
    end: int


def place_videos(
    token_ids: Sequence[int],
    videos: Sequence[VideoFrames],
    tokens: VideoTokens,
    encode: Callable[[str], list[int]],
    images: Sequence[PlacedImage] = (),
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """The prompt with each placeholder expanded, and the groups of frames in their places, with `images`, which were placed
    before. `encode`: the token ids of a text, without special tokens. A start and an end around the placeholder itself go: the
    model has learned on those of frames alone.

    Raises InvalidRequest where there are not as many placeholders as videos.
    """
    found = find_places(token_ids, tokens.placeholder, len(videos), "videos")
    out: list[int] = []
    placed, left, done = list[PlacedImage](), list(images), 0

    def copy(until: int) -> None:
        while left and left[0].start < until:
            image = left.pop(0)
            placed.append(PlacedImage(image.start - done + len(out), image.image))
        out.extend(token_ids[done:until])

    for at, video in zip(found, videos, strict=True):
        wrapped = at > done and token_ids[at - 1] == tokens.start and list(token_ids[at + 1 : at + 2]) == [tokens.end]
        copy(at - wrapped)
        for image, seconds in zip(video.images, video.seconds, strict=True):
            out += [*encode(f"<{seconds:.1f} seconds>"), tokens.start]
            placed.append(PlacedImage(len(out), image))
            out += [tokens.placeholder] * image.tokens
            out.append(tokens.end)
        done = at + 1 + wrapped
    copy(len(token_ids))
    return out, tuple(placed)
