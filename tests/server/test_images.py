"""Pictures through the real `octavo serve`, by the openai client: the model's own answers, and a sentence for what is wrong."""

from __future__ import annotations

import re
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from server.processes import Server
from server.vision_checkpoints import (
    PAD,
    PREPROCESSOR,
    TEMPLATE,
    ask,
    data_url,
    engine_says,
    file_of,
    picture,
    write_qwen3_vl,
)
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.text.chat_template import render_chat
from octavo.text.tokenizer import Tokenizer

FLAGS = ("--max-model-len", "1024", "--threads", "1", "--served-model-name", "tiny", "--cpu-kv-cache-gib", "0.1")
GREEDY: dict[str, Any] = dict(
    model="tiny", max_tokens=16, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True}
)
FP8 = ("--quantization", "ptpc_fp8", "--kv-cache-dtype", "fp8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    path = tmp_path_factory.mktemp("qwen3_vl")
    return write_qwen3_vl(path), path


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(saved: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In FP32, for answers that transformers gives too. Three images a request, and files below one directory."""
    media = tmp_path_factory.mktemp("media")
    (media / "a.png").write_bytes(file_of(picture(1)))
    more = ("--dtype", "float32", "--limit-mm-per-prompt", '{"image": 3}', "--allowed-local-media-path", str(media))
    server = Server("--model", str(saved[1]), *FLAGS, *more)
    server.media = media  # type: ignore[attr-defined]
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def text_of(messages: Any) -> str:
    return render_chat(TEMPLATE, messages, {})


def transformers_says(saved: tuple[PreTrainedModel, Path], images: list[Image.Image], count: int) -> list[int]:
    """Its own preprocessing, its own model, one forward pass over everything a token."""
    model, path = saved
    pixels = Qwen2VLImageProcessorPil(**PREPROCESSOR)(images, return_tensors="pt")
    ids, grids = list[int](), iter(pixels["image_grid_thw"])
    for token in Tokenizer(path).encode(text_of(ask(*images)), add_special_tokens=False):
        ids += [token] * (int(next(grids).prod()) // 4 if token == PAD else 1)
    start = len(ids)
    for _ in range(count):
        kinds = torch.tensor([[int(token == PAD) for token in ids]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), mm_token_type_ids=kinds, **pixels).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[start:]


def ids_of(client: openai.OpenAI, messages: Any, **more: Any) -> list[int]:
    answer = client.chat.completions.create(messages=messages, **{**GREEDY, **more})
    found: list[int] = answer.choices[0].model_dump()["token_ids"]
    return found


def streamed(client: openai.OpenAI, messages: Any, **more: Any) -> tuple[list[int], str, Any]:
    """Tokens, text and usage of a stream."""
    how = GREEDY | dict(stream=True, stream_options={"include_usage": True}) | more
    chunks = list(client.chat.completions.create(messages=messages, **how))
    ids = [token for chunk in chunks[:-1] for token in chunk.choices[0].model_dump().get("token_ids") or []]
    return ids, "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]), chunks[-1].usage


def test_answers_are_those_of_transformers(saved: tuple[PreTrainedModel, Path], client: openai.OpenAI) -> None:
    """Of files of several forms and sizes, alone and several in one message, streamed."""
    a, b, c = picture(1), picture(2), picture(3, 90, 31)
    expected = [transformers_says(saved, images, 16) for images in ([a], [b], [c, a, b])]
    assert len({*map(tuple, expected)}) == 3, "two pictures, two answers"
    assert len({token for ids in expected for token in ids}) > 12, "answers too dull to tell a mistake by"
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda images: streamed(client, ask(*images)), ([a], [b], [c, a, b])))
    assert [ids for ids, _, _ in found] == expected
    assert [ids_of(client, ask(data_url(one, form="BMP"))) for one in (b, a)] == [expected[1], expected[0]]
    as_responses = [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(a)}, "What is this?"]}]
    assert ids_of(client, as_responses) == expected[0]
    both = client.chat.completions.create(messages=ask(a), n=2, **GREEDY).choices  # type: ignore[call-overload]
    assert [one.model_dump()["token_ids"] for one in both] == [expected[0]] * 2


@pytest.mark.parametrize("flags", [(), FP8], ids=["bf16", "ptpc_fp8, fp8 KV"])
def test_answers_are_those_of_the_engine(flags: tuple[str, ...], saved: tuple[PreTrainedModel, Path]) -> None:
    path = saved[1]
    how = dict(zip(("quantization", "kv_cache_dtype"), flags[1::2], strict=False))
    core = EngineCore(EngineConfig(model=str(path), max_model_len=1024, threads=1, cpu_kv_cache_gib=0.1, device="cpu", **how))  # type: ignore[arg-type]
    expected = {seed: engine_says(core, path, text_of(ask(picture(seed))), picture(seed)) for seed in (1, 2)}
    assert expected[1] != expected[2]
    server = Server("--model", str(path), *FLAGS, *flags, "--mm-processor-cache-gb", "0")
    try:
        with client_of(server) as client:
            for seed in (1, 2):
                assert ids_of(client, ask(picture(seed))) == expected[seed]
    finally:
        server.stop()
    assert "vision" not in "".join(line for line in server.log if "not loaded" in line)


def test_the_second_turn_finds_the_picture_in_the_cache(server: Server, client: openai.OpenAI) -> None:
    first = ask(picture(11, 60, 80), text="Look.")
    _, text, usage = streamed(client, first)
    assert usage.prompt_tokens_details.cached_tokens == 0
    again = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    _, _, usage = streamed(client, again)
    assert usage.prompt_tokens_details.cached_tokens >= 70, "60 x 80 pixels are 80 tokens, of which blocks of 16 are shared"
    other = ask(picture(12, 60, 80), text="Look.")
    _, _, usage = streamed(client, other)
    assert usage.prompt_tokens_details.cached_tokens == 0, "another picture in the same words"
    counted = client.post("/../tokenize", body={"messages": again}, cast_to=object)
    assert isinstance(counted, dict)
    assert counted["count"] == len(counted["tokens"])
    assert counted["tokens"].count(PAD) == 80


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animated() -> bytes:
    return file_of(picture(1), "GIF", save_all=True, append_images=[picture(2), picture(3)])


def test_wrong_images_get_one_sentence(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    good = file_of(picture(1))
    seen = list[str]()

    class Secret(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(good)

    inner = HTTPServer(("127.0.0.1", 0), Secret)
    threading.Thread(target=inner.serve_forever, daemon=True).start()
    port = inner.server_address[1]
    (tmp_path / "outside.png").write_bytes(good)
    large = Image.fromarray(np.zeros((8300, 8300), np.uint8))
    wrong: dict[str, tuple[list[Any], str]] = {
        "base64": (["data:image/png;base64,AAA"], "not valid base64"),
        "cut base64": ([data_url(good)[:-99] + "!"], "not valid base64"),
        "truncated": ([good[: len(good) // 2]], "damaged or cut off"),
        "a bomb": ([bomb()], "too many pixels|60000 x 60000 pixels"),
        "too large": ([file_of(large)], "8300 x 8300 pixels; at most"),
        "no bytes": ([b""], "no bytes at all"),
        "no image": ([b"%PDF-1.4 nothing"], "of no format that is read here"),
        "too long": ([file_of(Image.new("L", (900, 2)))], "more than 200 times as long"),
        "over the limit": ([good] * 4, r"may have 3 images here \(--limit-mm-per-prompt\), and this has 4"),
        "loopback": ([f"http://127.0.0.1:{port}/a.png"], "no public address"),
        "a name of loopback": ([f"http://localhost:{port}/a.png"], "no public address"),
        "this server": ([f"{server.url}/metrics"], "no public address"),
        "metadata": (["http://169.254.169.254/latest/meta-data"], "no public address"),
        "a scheme": (["ftp://example.com/a.png"], "should begin with data:"),
        "a file outside": ([f"file://{tmp_path}/outside.png"], "not below the directory"),
        "a file that is not": ([f"file://{server.media}/b.png"], "No such file"),  # type: ignore[attr-defined]
    }
    try:
        for name, (images, sentence) in wrong.items():
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(messages=ask(*images), **GREEDY)  # type: ignore[arg-type]
            body: Any = caught.value.body
            assert re.search(sentence, body["message"]), (name, body)
            assert body["message"].endswith(".")
            assert body["param"] == ("messages" if name == "over the limit" else "messages.0.content.0"), name
        assert not seen
    finally:
        inner.shutdown()
        inner.server_close()
    messages: Any
    for messages, sentence in (
        (ask(good, text="<|image_pad|>"), "no text may spell it"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content.0 should be like"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages.0.content.0 should be like"),
        ([{"role": "user", "content": [{"type": "image_pil", "image_pil": {}}]}], "messages.0.content.0 should be like"),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}], "A video's data: URL should"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.chat.completions.create(messages=messages, **GREEDY)
    first = ids_of(client, ask(good))
    assert ids_of(client, ask(f"file://{server.media}/a.png")) == first  # type: ignore[attr-defined]
    moving = client.chat.completions.create(messages=ask(animated()), **GREEDY)  # type: ignore[arg-type]
    assert moving.choices[0].finish_reason == "length", "the first frame"
    plain: Any = [{"role": "user", "content": "<|image_pad|> is a token like others without an image."}]
    assert len(ids_of(client, plain)) == 16
    assert server.get("/health")[0] == 200


def rss(server: Server) -> float:
    """MiB of the API process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def test_images_leave_nothing_in_the_server(server: Server, client: openai.OpenAI) -> None:
    """Files of 3 MB and 12 MB as base64, refused ones among them."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 1500, 3), np.uint8)
    small, large = file_of(Image.fromarray(noise[:1000, :1000])), file_of(Image.fromarray(noise), compress_level=1)

    held = []
    for number in range(6):
        client.chat.completions.create(messages=ask(small, large, text=f"{number}"), **GREEDY)  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(messages=ask(large, large[:-99999]), **GREEDY)  # type: ignore[arg-type]
        held.append(rss(server))
    assert max(held[2:]) < held[1] + 40, held


@pytest.mark.parametrize("whole", [True, False], ids=["text alone", "no preprocessor"])
def test_images_that_are_not_read(whole: bool, tmp_path: Path, saved: tuple[PreTrainedModel, Path]) -> None:
    """The server starts, serves text, and says why it reads no image."""
    for file in saved[1].iterdir():
        if whole or file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)
    server = Server("--model", str(tmp_path), *FLAGS, *["--language-model-only"] * whole)
    sentence = "Images are switched off here" if whole else "preprocessor_config.json is missing, and images cannot be prepared"
    try:
        told = [line for line in server.log if "images are refused" in line]
        assert [sentence in line for line in told] == [True] * (not whole)
        assert any("model.visual.* not loaded" in line for line in server.log) == whole
        with client_of(server) as client:
            with pytest.raises(openai.BadRequestError, match=sentence):
                client.chat.completions.create(messages=ask(picture(1)), **GREEDY)  # type: ignore[arg-type]
            plain: Any = [{"role": "user", "content": "Hello"}]
            assert len(ids_of(client, plain)) == 16
    finally:
        server.stop()


def test_flags_of_images() -> None:
    """Wrong ones end the start before the model is loaded; on a model of text alone a line says that they do nothing."""
    for flags, sentence in (
        (("--allowed-local-media-path", "/nowhere"), "must be a directory, and '/nowhere' is none"),
        (("--allowed-media-domains", "http://a.test"), "takes names of hosts"),
        (("--limit-mm-per-prompt", "images=1"), "--limit-mm-per-prompt must be like"),
        (("--mm-processor-cache-gb", "-1"), "--mm-processor-cache-gb must be 0 or more"),
    ):
        server = Server(*flags, ready=False)
        assert server.end(30) != 0
        assert sentence in "".join(server.log)
        assert "Traceback" not in "".join(server.log)
    given = ("--limit-mm-per-prompt", "image=1", "--language-model-only", "--mm-processor-cache-gb", "1")
    given += ("--allowed-local-media-path", "/tmp", "--allowed-media-domains", "a.test")
    server = Server(*given, "--threads", "1")
    try:
        (line,) = [line for line in server.log if "without effect, since this model reads text alone" in line]
        assert all(flag in line for flag in given if flag.startswith("--"))
        with client_of(server) as client, pytest.raises(openai.BadRequestError, match="reads text alone; leave images out"):
            client.chat.completions.create(messages=ask(picture(1)), **GREEDY | {"model": "octavo-demo"})  # type: ignore[arg-type]
    finally:
        server.stop()
