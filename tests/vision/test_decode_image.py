"""Files of every kind against transformers' conversion, and damaged ones: an RGB image or one sentence, within bounds."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from octavo.errors import InvalidRequest
from octavo.vision import prepare
from octavo.vision.decode_image import FORMATS, decode, rgb
from octavo.vision.kimi_images import KimiImages
from octavo.vision.qwen_images import QwenImages

RNG = np.random.default_rng(0)


def noise(rows: int, columns: int, channels: int = 3, dtype: Any = np.uint8) -> NDArray[Any]:
    return RNG.integers(0, np.iinfo(dtype).max, (rows, columns, channels)[: 3 if channels > 1 else 2], dtype, endpoint=True)


def file_of(image: Image.Image, kind: str, **given: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **given)
    return out.getvalue()


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits, gray or RGB, with or without alpha: Pillow writes gray alone."""
    rows, columns, channels = (*pixels.shape, 1)[:3]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_every_mode_is_what_transformers_makes_of_it() -> None:
    """Alpha over white, palettes, CMYK, bits; one pixel; EXIF's eight turns."""
    colors = Image.fromarray(noise(13, 21))
    alpha = Image.fromarray(noise(13, 21, 4))
    palette = colors.quantize(17)
    files = [
        *(file_of(colors, kind) for kind in FORMATS), *(file_of(alpha, kind) for kind in ("PNG", "WEBP", "TIFF", "AVIF")),
        file_of(colors.convert("L"), "PNG"), file_of(colors.convert("1"), "PNG"), file_of(colors.convert("L"), "JPEG"),
        file_of(alpha.convert("LA"), "PNG"), file_of(palette, "PNG"), file_of(palette, "PNG", transparency=3),
        file_of(palette, "PNG", transparency=bytes(range(0, 255, 15))), file_of(palette, "GIF", transparency=5),
        file_of(alpha.convert("PA").convert("RGBA").quantize(9), "PNG"), file_of(colors, "PNG", transparency=(1, 2, 3)),
        file_of(colors.convert("CMYK"), "JPEG"), file_of(colors.convert("CMYK"), "TIFF"),
        file_of(colors.convert("LAB"), "TIFF"),
        file_of(colors, "JPEG", progressive=True, subsampling=0), file_of(colors.resize((1, 1)), "PNG"),
        file_of(colors.resize((1, 1)), "JPEG"), png16(noise(3, 5, 3, np.uint16)), png16(noise(3, 5, 4, np.uint16)),
    ]  # fmt: skip
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        files += [file_of(colors, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    for data in files:
        image = Image.open(BytesIO(data))
        try:
            expected = convert_to_rgb(ImageOps.exif_transpose(image), return_numpy=True)
        except ValueError:  # it takes LAB's second channel for alpha
            assert image.mode == "LAB"
            expected = np.asarray(image.convert("RGB"))
        found = decode(data)
        assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
        assert np.array_equal(found, expected), (image.format, image.mode, image.info.keys())


def test_sixteen_bits_keep_their_high_byte() -> None:
    """Gray as color does; Pillow's conversion would make white of nearly every gray pixel."""
    gray = noise(7, 9, 1, np.uint16)
    expected = np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, 2)
    opaque = np.full_like(gray, 65535)
    for channels in ([gray], [gray] * 3, [gray, opaque], [gray, gray, gray, opaque]):
        pixels = np.stack(channels, 2) if len(channels) > 1 else gray
        assert np.array_equal(decode(png16(pixels)), expected), len(channels)
    assert np.array_equal(decode(file_of(Image.fromarray(gray), "TIFF")), expected)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.fromarray(noise(8, 8)).quantize(16).convert("RGB") for _ in range(3)]
    for kind, given in (
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **given)
        assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3, kind
        off = [np.abs(decode(data).astype(int) - np.asarray(frame)).mean() for frame in frames]
        assert off[0] <= (20 if kind == "AVIF" else 0) < min(off[1:]), (kind, off)


def refusal_of(data: bytes, **given: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(data, **given)
    return str(caught.value)


def test_what_cannot_be_read_is_one_sentence() -> None:
    colors = Image.fromarray(noise(64, 64))
    for kind in FORMATS:
        data = file_of(colors, kind)
        for length in (len(data) // 2, len(data) // 4, 40):
            assert refusal_of(data[:length]).endswith("."), (kind, length)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for data in (eps, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"\0" * 99, b"P6 1 1 255 abc", b"%PDF-1.7"):
        assert "known are JPEG, PNG, WEBP, GIF, BMP, TIFF and AVIF" in refusal_of(data)
    assert "no bytes" in refusal_of(b"")
    for mode in ("I", "F"):
        assert "32 bits" in refusal_of(file_of(Image.new(mode, (2, 2)), "TIFF"))
    broken = Image.Exif()
    broken[0x0112] = 6
    data = file_of(colors, "JPEG", exif=broken.tobytes()[:-9])  # damaged EXIF harms no pixel
    assert decode(data).shape == (64, 64, 3)


def test_bombs_are_refused_by_their_headers() -> None:
    """Small files of very many pixels, some past Pillow's own limits: in milliseconds, and without memory for the pixels."""
    small = np.zeros((4, 4), np.uint8)
    png = bytearray(file_of(Image.fromarray(small), "PNG"))
    gif, bmp = bytearray(file_of(Image.fromarray(small), "GIF")), bytearray(file_of(Image.fromarray(small), "BMP"))
    bombs = []
    for side in (9000, 12_000, 14_000, 60_000):
        png[16:24] = struct.pack(">II", side, side)
        png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
        gif[6:10] = struct.pack("<HH", side, side)
        bmp[18:26] = struct.pack("<ii", side, side)
        bombs += [bytes(png), bytes(gif), bytes(bmp)]
    real = file_of(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(real) < 100_000
    tracemalloc.start()
    for data in (*bombs, real):
        start = time.process_time()
        assert "pixels" in refusal_of(data)
        assert time.process_time() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    line = file_of(Image.new("L", (1000, 10)), "PNG")
    assert "1000 x 10 pixels; at most 9,999" in refusal_of(line, max_pixels=9999)
    assert decode(line, max_pixels=10_000).shape == (10, 1000, 3)


def test_fuzzed_files_are_an_image_or_one_sentence() -> None:
    """1,000 files: bytes changed, cut out, doubled and appended. Pillow's decoders raise errors of many kinds."""
    chance = random.Random(0)
    colors, alpha = Image.fromarray(noise(24, 24)), Image.fromarray(noise(24, 24, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    given: dict[str, dict[str, Any]] = {"JPEG": {"exif": exif}, "GIF": {"save_all": True, "append_images": [colors.rotate(90)]}}
    files = [file_of(colors, kind, **given.get(kind, {})) for kind in FORMATS] + [
        file_of(alpha, "PNG"),
        png16(noise(9, 9, 4, np.uint16)),
    ]
    processors = [QwenImages(), KimiImages()]
    refusals = []
    for number in range(1000):
        data = bytearray(files[number % len(files)])
        for _ in range(chance.choice([1, 1, 2, 8])):
            at, length = chance.randrange(len(data)), chance.randrange(1, 9)
            header = chance.random() < 0.5
            at = at % 64 if header else at
            match chance.randrange(4):
                case 0:
                    data[at : at + length] = chance.randbytes(length)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[at : at + length]
                case 3:
                    data[at : at + 1] = bytes([chance.choice([0, 1, 127, 128, 255])])
        try:
            found = prepare(bytes(data), processors[number % 2], max_pixels=1 << 20)
        except InvalidRequest as error:
            refusals.append(str(error))
        else:
            assert np.isfinite(found.values[:, found.pixels]).all()
    assert 100 < len(refusals) < 900
    assert [told for told in refusals if not told.endswith(".") or "\n" in told or len(told) > 250] == []


def test_pillow_images_are_read_too() -> None:
    image = Image.fromarray(noise(5, 6, 4))
    assert np.array_equal(rgb(image), convert_to_rgb(image, return_numpy=True))
