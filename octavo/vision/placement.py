"""Where the images of a prompt stand: a chat template writes one placeholder token an image, which becomes its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.errors import InvalidRequest
from octavo.images import ImagePatches, PlacedImage

__all__ = ["find_places", "place_images"]


def find_places(token_ids: Sequence[int], placeholder: int, count: int, kind: str) -> list[int]:
    """Where the placeholders stand, of which there must be `count`, else InvalidRequest; `kind`: such as images."""
    found = [at for at, token in enumerate(token_ids) if token == placeholder]
    if len(found) != count:
        raise InvalidRequest(
            f"The prompt has {count} {kind} and {len(found)} places for them (token {placeholder}); each needs one, and "
            "no text may spell it.",
            "messages",
        )
    return found


def place_images(
    token_ids: Sequence[int], images: Sequence[ImagePatches], placeholder: int
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """The prompt with each `placeholder` repeated for every token of its image, and the images in their places.

    Raises InvalidRequest where there are not as many placeholders as images: a chat template left images out, or the text of a
    message spells the placeholder.
    """
    found = find_places(token_ids, placeholder, len(images), "images")
    out: list[int] = []
    placed, done = [], 0
    for at, image in zip(found, images, strict=True):
        out += token_ids[done:at]
        placed.append(PlacedImage(len(out), image))
        out += [placeholder] * image.tokens
        done = at + 1
    return out + list(token_ids[done:]), tuple(placed)
