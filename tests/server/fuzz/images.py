"""Chats with images that nobody should send: damaged files, bombs, odd sizes, URLs that lead elsewhere, wrong types."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from server.fuzz.generator import Generator, Sent

__all__ = ["ImageGenerator"]

MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("RGB", "P", "L"),
    "TIFF": ("RGB", "RGBA", "CMYK", "F", "I;16", "1"),
    "BMP": ("RGB", "1"),
    "PPM": ("RGB", "L"),
    "AVIF": ("RGB", "RGBA"),
}
SIZES = ((1, 1), (1, 2), (3, 1), (7, 13), (33, 31), (64, 64), (97, 300), (40, 56), (200, 150), (256, 255))
ODD_SIZES = ((1, 200), (201, 1), (1, 4000), (640, 480), (1500, 1100))
PADS = ("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
URLS = (
    "http://127.0.0.1:PORT/health", "http://localhost:PORT/v1/models", "http://127.1:PORT/", "http://2130706433:PORT/",
    "http://0x7f000001:PORT/", "http://0177.0.0.1:PORT/", "http://0.0.0.0:PORT/", "http://[::1]:PORT/",
    "http://[::]:PORT/", "http://[::ffff:127.0.0.1]:PORT/", "http://[::ffff:7f00:1]/",
    "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://192.168.1.1/a.png", "http://172.16.0.1/",
    "http://100.64.0.1/", "http://[fe80::1%25eth0]/", "http://[fd00::1]/", "http://user:secret@127.0.0.1:PORT/",
    "http://127.0.0.1:PORT@example.invalid/", "http://example.invalid/a.png", "http://a..b/",
    "http://" + "a" * 300 + "/", "http://" + "a." * 2000 + "/", "http://\u0130\u0130.invalid/", "http://\u2488\u24d0/",
    "http://", "http:///", "http://:80/", "http://x:0/", "http://127.0.0.1:99999/", "http://127.0.0.1:-1/",
    "http://127.0.0.1:x/", "http://[", "http://[::1", "http://]/", "http://%31%32%37.0.0.1/", "http://127.0.0.1\t/",
    "http://127.0.0.1\r\nHost: a/", "http://a b/", "http://\x00/", "https://127.0.0.1:PORT/", "HTTP://LOCALHOST:PORT/",
    "//127.0.0.1/", "/etc/passwd", "a.png", "", " ", "file:///etc/passwd", "file://localhost/etc/passwd",
    "file:../../etc/passwd", "FILE:///proc/self/environ", "ftp://127.0.0.1/", "gopher://127.0.0.1/",
    "javascript:alert(1)", "blob:x", "about:blank", "http://\ud800/", "data", "data:", "data:,", "data:;base64",
    "data:;base64,", "data:image/png;base64", "data:image/png,%89PNG", "data:text/html;base64,PGh0bWw+",
    "data:image/png;base64,====", "data:image/png;base64,\u00e9", "data:" + "a" * 20_000 + ",",
    "data:;" + "base64;" * 3000 + ",AA==", "data:;base64," + "A" * 99_999,
)  # fmt: skip


def _pixels(pick: random.Random, mode: str, size: tuple[int, int]) -> Image.Image:
    noise = np.frombuffer(pick.randbytes(1 << 12), np.uint8)
    columns, rows = size
    image = Image.fromarray(np.resize(noise, (rows, columns, 3)))
    if mode == "I;16":
        return Image.fromarray(np.resize(noise.view(np.uint16), (rows, columns)))
    return image.convert(mode)


def _file(pick: random.Random) -> bytes:
    """Of any format, mode and size; some turned by EXIF, some animated."""
    form = pick.choice(list(MODES))
    size = pick.choice(SIZES if pick.random() < 0.9 else ODD_SIZES)
    image, out = _pixels(pick, pick.choice(MODES[form]), size), BytesIO()
    how: dict[str, Any] = {}
    if form in ("PNG", "GIF", "WEBP", "TIFF") and pick.random() < 0.2:
        how = {"save_all": True, "append_images": [image] * pick.choice((1, 5))}
    elif form in ("JPEG", "PNG", "WEBP") and pick.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = pick.choice((0, 1, 3, 6, 8, 9, 65535))
        how = {"exif": exif}
    image.save(out, form, **how)
    return out.getvalue()


def _damaged(data: bytes, pick: random.Random) -> bytes:
    """Cut, changed, doubled or with something between."""
    at, byte = pick.randrange(len(data) + 1), bytes([pick.randrange(256)])
    kind = pick.randrange(7)
    if kind == 0:
        return data[:at]
    if kind < 3:
        changed = bytearray(data)
        for _ in range(pick.choice((1, 1, 4, 64))):
            changed[pick.randrange(min(len(data), pick.choice((40, 200, 1 << 30))))] = pick.choice(
                (0, 255, pick.randrange(256))
            )
        return bytes(changed)
    if kind == 3:
        return data[:at] + byte * pick.choice((1, 1000)) + data[at:]
    if kind == 4:
        return data[:at] + data[at + pick.choice((1, 8, 100)) :]
    return data * 2 if kind == 5 else pick.randbytes(at)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(columns: int, rows: int, *chunks: tuple[bytes, bytes], depth: int = 8, color: int = 0) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(_chunk(*chunk) for chunk in chunks) + _chunk(b"IEND", b"")


@cache
def _zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 1)


def _tiff(columns: int, rows: int, following: int) -> bytes:
    """Two tags say the size; `following`: where the next directory lies."""
    tags = [(256, columns), (257, rows), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, rows), (279, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: _png(8000, 8000, (b"IDAT", _zeros(8001 * 8000))),  # as many pixels as are read, of a few KB
    lambda: _png(30_000, 30_000, (b"IDAT", _zeros(3751 * 30_000)), depth=1),
    lambda: _png(2**31 - 1, 2**31 - 1, (b"IDAT", _zeros(100))),
    lambda: _png(2**32 - 1, 1, (b"IDAT", _zeros(100)), color=6),
    lambda: _png(0, 0, (b"IDAT", b"")),
    lambda: _png(4, 4, (b"zTXt", b"a\0\0" + _zeros(100_000_000)), (b"IDAT", _zeros(20))),
    lambda: _png(4, 4, (b"iCCP", b"a\0\0" + _zeros(100_000_000)), (b"IDAT", _zeros(20))),
    lambda: _png(4, 4, *[(b"tEXt", b"a\0" + b"b" * 9)] * 50_000, (b"IDAT", _zeros(20))),
    lambda: _png(4, 4, (b"IDAT", _zeros(100_000_000))),
    lambda: _png(64, 64, (b"acTL", struct.pack(">II", 2**31 - 1, 0)), (b"IDAT", _zeros(64 * 65))),
    lambda: (
        b"GIF89a" + struct.pack("<HHBBBBIHHB", 65535, 65535, 0, 0, 0, 44, 0, 65535, 65535, 0) + b"\2\1\4\0;"
    ),
    lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6,
    lambda: _tiff(2**31, 2**31, 0),
    lambda: _tiff(8, 8, 8) + bytes(64),  # the next directory is this one
    lambda: _tiff(60_000, 60_000, 0) + bytes(64),
    lambda: b"P6 99999999 99999999 255\n",
    lambda: b"P3 2000 2000 " + b"9" * 100_000,
    lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
)  # fmt: skip


class ImageGenerator:
    """The same requests for the same seed. `port`: the server's own, to which some URLs lead."""

    def __init__(self, seed: int, port: int):
        self.random, self.values, self.port = random.Random(seed), Generator(seed), port
        self.values.deep = 300

    def request(self) -> Sent:
        """The next one."""
        pick, kinds = self.random, list[str]()
        body: dict[str, Any] = {"max_tokens": 3, "stream": pick.random() < 0.4}
        if pick.random() < 0.1:
            how = ({"n": 8}, {"prompt_logprobs": 1}, {"logprobs": True, "top_logprobs": 3}, {"cache_salt": "s"})
            body |= pick.choice((*how, {"guided_choice": ["yes", "no"]}, {"response_format": {"type": "json_object"}}))
        body["messages"] = [self._message(kinds) for _ in range(pick.choice((1, 1, 1, 1, 2, 3)))]
        path = "/tokenize" if pick.random() < 0.05 else "/v1/chat/completions"
        data = json.dumps(body, ensure_ascii=pick.random() < 0.5).encode("utf-8", "surrogatepass")
        if pick.random() < 0.02:
            data = _damaged(data, pick)
        return Sent(path, data, f"{path} {kinds} {data[:200]!r} ({len(data)} bytes)")

    def _message(self, kinds: list[str]) -> Any:
        pick = self.random
        role = pick.choice(("user", "user", "user", "user", "system", "assistant", "tool"))
        if pick.random() < 0.03:
            return {"role": role, "content": self.values.value()}
        parts = [self._part(kinds) for _ in range(pick.choice((1, 1, 1, 1, 2, 3)))]
        if pick.random() < 0.03:
            kinds.append("many")
            parts *= pick.choice((50, 1200)) if len(str(parts)) < 2000 else 5
        if pick.random() < 0.6:
            text = pick.choice(("What?", "What?", "What?", "", *PADS, PADS[0] * 300, self.values.text()))
            parts.insert(pick.randrange(len(parts) + 1), {"type": "text", "text": text})
        return {"role": role, "content": parts}

    def _part(self, kinds: list[str]) -> Any:
        """Most are of the form that they should have, so that what is in them is read."""
        pick = self.random
        if pick.random() < 0.1:
            kinds.append("form")
            return self._odd_form()
        url = self._url(kinds)
        if pick.random() < 0.85:
            return {"type": "image_url", "image_url": {"url": url}}
        if pick.random() < 0.4:
            kinds.append("video")
            frames = [url, *[self._url(kinds) for _ in range(pick.choice((0, 1, 3)))]] * pick.choice((1, 1, 20))
            return pick.choice(({"type": "video_url", "video_url": {"url": url}}, {"type": "video", "video": frames}))
        return pick.choice((
            {"type": "image_url", "image_url": url}, {"type": "input_image", "image_url": url}, {"image_url": {"url": url}},
            {"type": "image", "image": url}, {"type": "image_url", "image_url": {"url": url, "detail": self.values.value()}},
        ))  # fmt: skip

    def _odd_form(self) -> Any:
        pick, value = self.random, self.values.value()
        return pick.choice((
            value, {"type": "image_url"}, {"type": "image_url", "image_url": value},
            {"type": "image_url", "image_url": {"url": value}}, {"type": value, "image_url": {"url": "data:,"}},
            {"type": "image_url", "image_url": {}}, {"type": "image_pil", "image_pil": value}, {"type": "image"},
            {"type": "image", "image": value}, {"type": "video_url", "video_url": {"url": "data:,"}},
            {"type": "input_audio", "input_audio": value}, {"type": "image_embeds", "image_embeds": value},
            {"type": "text", "text": value}, {"type": "image_url", "image_url": {"url": ["data:,"]}, "text": value}, [],
            {}, None,
        ))  # fmt: skip

    def _url(self, kinds: list[str]) -> str:
        pick, at = self.random, self.random.random()
        if at < 0.12:
            kinds.append("url")
            return pick.choice(URLS).replace("PORT", str(self.port))
        if at < 0.16:
            kinds.append("bomb")
            data = pick.choice(BOMBS)()
        else:
            data = _file(pick)
            kinds.append("file")
            if pick.random() < 0.35:
                kinds[-1] = "damaged"
                data = _damaged(data, pick)
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        if pick.random() < 0.1:
            kinds[-1] += " in a damaged URL"
            cut = pick.randrange(len(url))
            url = pick.choice((
                url[:cut], url[:cut] + " \n" + url[cut:], url.replace("base64", "BASE64"), url.upper(), url.rstrip("="),
                url + "=", url + "A", url.replace("+", "-").replace("/", "_"), url.replace(";base64", ""),
                url[:cut] + "\u00e9" + url[cut:], "  " + url, "DATA" + url[4:],
                url.replace("image/png", "text/html;charset=utf-8"), url.replace("+", "%2B"), url[5:],
            ))  # fmt: skip
        return url
