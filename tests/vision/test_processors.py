"""Preprocessing against transformers' processors: 200 random images a family, of odd, tiny and long shapes."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import image_processing_backends
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from octavo.errors import InvalidRequest, OctavoError
from octavo.images import ImagePatches
from octavo.layers.vision import patch_values
from octavo.vision import image_processor
from octavo.vision.patches import digest

# The hub's files of Qwen3-VL and Kimi-K2.5, but for the bounds: fewer pixels are quicker.
QWEN = {
    "size": {"longest_edge": 150_000, "shortest_edge": 65_536}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
QWEN2 = {
    "min_pixels": 3136, "max_pixels": 100_352, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
KIMI = {
    "media_proc_cfg": {
        "in_patch_limit": 150, "patch_size": 14, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2, "fixed_output_tokens": None, "patch_limit_on_one_side": 40,
    }
}  # fmt: skip
KIMI_OF_TRANSFORMERS = {
    "max_patches": 200, "size": {"max_height": 30, "max_width": 30}, "patch_size": 14, "merge_size": 2,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "do_resize": True,
}  # fmt: skip


def images(count: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Noise over gradients, of sides from 1 to 900, every fourth up to 200 times as long as wide."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        rows, columns = (int(math.exp(one)) for one in rng.uniform(0, math.log(900), 2))
        if number % 4 == 0:
            rows, columns = int(rng.integers(1, 12)), int(rng.integers(1, 900))
        columns, rows = max(columns, -(-rows // 200)), max(rows, -(-columns // 200))
        if number % 2:
            rows, columns = columns, rows
        base = np.linspace(0, 255, rows)[:, None, None] * rng.random(3) + np.linspace(0, 99, columns)[None, :, None]
        yield (base + rng.integers(0, 120, (rows, columns, 3))).clip(0, 255).astype(np.uint8)


def patches(image: ImagePatches) -> NDArray[np.float32]:
    """What the tower reads, [P, values]."""
    pixels, values = torch.from_numpy(image.pixels), torch.from_numpy(image.values)
    assert pixels.dtype == torch.uint8
    return patch_values(pixels, values, image.frames).numpy()


def processor(model_type: str, config: dict[str, Any], directory: Path) -> Any:
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    return image_processor(model_type, directory)


@pytest.mark.parametrize("config", [QWEN, QWEN2], ids=["qwen3-vl", "qwen2.5-vl"])
def test_qwens_patches_are_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = processor("qwen3_vl", config, tmp_path), Qwen2VLImageProcessorPil(**config)
    for image in images(100, seed=len(config)):
        expected, found = theirs(Image.fromarray(image), return_tensors="np"), ours(image)
        assert [list(found.grid)] == expected["image_grid_thw"].tolist(), image.shape
        assert np.array_equal(patches(found), expected["pixel_values"]), image.shape
        assert found.tokens == len(found.pixels) // 4 == theirs.get_number_of_image_patches(*image.shape[:2]) // 4


def torchvision_functions() -> Any:
    """What torchvision, which is not installed, does for the processor by torch's own functions."""

    def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, tuple(size), mode=interpolation, antialias=antialias)

    def pad(image: torch.Tensor, padding: tuple[int, ...], fill: int, padding_mode: str) -> torch.Tensor:
        left, top, right, bottom = padding
        return torch.nn.functional.pad(image, (left, right, top, bottom), padding_mode, fill)

    def normalize(image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, inplace: bool) -> torch.Tensor:
        return (image - mean[:, None, None]) / std[:, None, None]

    modes = SimpleNamespace(LANCZOS="lanczos", BILINEAR="bilinear")
    return SimpleNamespace(resize=resize, pad=pad, normalize=normalize, InterpolationMode=modes)


@pytest.fixture
def kimi_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    functions = torchvision_functions()
    v2 = ModuleType("torchvision.transforms.v2")
    v2.functional = functions  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, name, v2)
    monkeypatch.setattr(image_processing_backends, "tvF", functions, raising=False)
    name = "transformers.models.kimi_k25.image_processing_kimi_k25"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).Kimi_K25ImageProcessor
    sys.modules.pop(name, None)


@pytest.mark.parametrize("config", [KIMI, KIMI_OF_TRANSFORMERS], ids=["hub", "transformers"])
def test_kimis_patches_are_those_of_transformers(config: dict[str, Any], tmp_path: Path, kimi_class: Any) -> None:
    """Where an image is scaled down, one value in a hundred may differ by two steps of a byte: torch's weights are coarser."""
    own = config.get("media_proc_cfg", config)
    side = own.get("patch_limit_on_one_side") or own["size"]["max_height"]
    ours, theirs = processor("kimi_k25", config, tmp_path), object.__new__(kimi_class)
    scaled_down = 0
    for image in images(100, seed=side):
        found = ours(image)
        expected = theirs._preprocess(
            [torch.from_numpy(image).permute(2, 0, 1)],
            do_resize=True, size=SimpleNamespace(max_height=side), resample="bicubic", do_rescale=True, rescale_factor=1 / 255,
            do_normalize=True, image_mean=tuple(own["image_mean"]), image_std=tuple(own["image_std"]),
            patch_size=14, merge_size=2, max_patches=own.get("in_patch_limit") or own["max_patches"],
            disable_grouping=None, return_tensors=None,
        )  # fmt: skip
        assert [list(found.grid)] == expected["image_grid_thw"].tolist(), image.shape
        values = expected["pixel_values"].numpy()
        mine = patches(found).reshape(values.shape)
        assert found.tokens == len(values) // 4
        off = np.abs(mine - values).max(axis=(0, 2, 3)) * 255 * own["image_std"]
        assert off.max() < 2.001, image.shape
        assert np.count_nonzero(mine != values) <= 0.01 * values.size, image.shape
        if all(14 * patches >= pixels for patches, pixels in zip(found.grid[1:], image.shape, strict=False)):
            assert np.array_equal(mine, values), image.shape
        else:
            scaled_down += 1
    assert 10 < scaled_down < 90


def test_shapes_and_configs_that_are_refused(tmp_path: Path) -> None:
    qwen = processor("qwen3_vl", QWEN, tmp_path)
    for rows, columns in ((1, 201), (2010, 10), (1, 100_000)):
        with pytest.raises(InvalidRequest, match=f"^An image of {columns} x {rows} pixels is more than 200 times as long"):
            qwen(np.zeros((rows, columns, 3), np.uint8))
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("qwen3_vl", {**QWEN, "patch_size": "16"}, "patch_size must be an integer over 0, not '16'"),
        ("qwen3_vl", {**QWEN, "min_pixels": 0}, "min_pixels must be"),
        ("qwen3_vl", {**QWEN, "size": {"longest_edge": 1}}, "fewest pixels"),
        ("qwen3_vl", {**QWEN, "image_mean": [0.5]}, "image_mean must be a list of three numbers"),
        ("qwen3_vl", {**QWEN, "image_std": [0.5, 0, 0.5]}, "image_std must not be 0"),
        ("qwen3_vl", {**QWEN, "resample": 2}, "resample must be 3"),
        ("qwen3_vl", {**QWEN, "do_resize": False}, "do_resize must be True"),
        ("qwen3_vl", {**QWEN, "rescale_factor": 1}, "rescale_factor must be 1/255"),
        ("kimi_k25", {"size": {"max_height": 3, "max_width": 4}}, "equal max_height and max_width"),
        ("kimi_k25", {"media_proc_cfg": {"fixed_output_tokens": 9}}, "fixed_output_tokens must be null"),
        ("llama", QWEN, "Models of type llama read no images"),
    ]
    for model_type, config, sentence in wrong:
        with pytest.raises(OctavoError, match=sentence):
            processor(model_type, config, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(OctavoError, match=r"preprocessor_config\.json is missing"):
        image_processor("qwen3_vl", tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": QWEN}))
    assert image_processor("qwen3_vl", tmp_path) == qwen


def test_equal_pixels_alone_have_equal_digests() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    other = image.copy()
    other[1, 2, 0] ^= 1
    found = [digest(image), digest(image[::-1][::-1]), digest(image.reshape(4, 2, 3)), digest(other)]
    assert found[0] == found[1]
    assert len(set(found)) == 3
