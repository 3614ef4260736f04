"""What a chat names as images, from messages to patches."""

from __future__ import annotations

import asyncio
import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.errors import InvalidRequest
from octavo.layers.vision import patch_values
from octavo.vision import FetchRules, ImagePart, fetch_parts, image_parts, image_processor, prepare


def image_of(color: str) -> str:
    out = BytesIO()
    Image.new("RGB", (70, 40), color).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_images_of_a_chat_become_patches_in_their_order(tmp_path: Path) -> None:
    red, blue = image_of("red"), image_of("blue")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "No image_url here."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": red}}, "text"]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "input_image", "image_url": blue},
                                     {"type": "image_url", "image_url": {"url": red}}]},
    ]  # fmt: skip
    parts = image_parts(messages, limit=3)
    assert parts == [
        ImagePart(red, "messages.1.content.1"), ImagePart(blue, "messages.3.content.0"), ImagePart(red, "messages.3.content.1"),
    ]  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"patch_size": 16, "image_mean": [0] * 3, "image_std": [1] * 3})
    )
    processor = image_processor("qwen3_vl", tmp_path)
    first, second, third = (prepare(data, processor) for data in asyncio.run(fetch_parts(parts, FetchRules())))
    assert first.grid == second.grid == (1, 4, 6)
    assert first.tokens == 6
    for image, color in ((first, 0), (second, 2), (third, 0)):
        pixels, table = torch.from_numpy(image.pixels), torch.from_numpy(image.values)
        values = patch_values(pixels, table, image.frames).view(24, 3, 2, 16, 16)
        assert (
            [values[:, one].min() for one in range(3)] == [values[:, one].max() for one in range(3)] == list(np.eye(3)[color])
        )
    assert first.digest == third.digest != second.digest
    picture = Image.new("RGB", (70, 40), "blue")
    pictures = [{"role": "user", "content": [{"type": "image_pil", "image_pil": picture}, {"type": "image", "image": blue}]}]
    for source in asyncio.run(fetch_parts(image_parts(pictures), FetchRules())):
        assert prepare(source, processor).digest == second.digest
    with pytest.raises(InvalidRequest, match=r"may have 2 images here .* this has 3"):
        image_parts(messages, limit=2)
    for given in (None, 5, {}, {"url": None}, {"url": ["a"]}, []):
        with pytest.raises(InvalidRequest, match=r"^messages\.0\.content\.0 should be like") as caught:
            image_parts([{"role": "user", "content": [{"type": "image_url", "image_url": given}]}])
        assert caught.value.param == "messages.0.content.0"
