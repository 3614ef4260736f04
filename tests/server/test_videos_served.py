"""Videos through the real `octavo serve`: what LLM answers in process, and a sentence for what is wrong."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from server.processes import Server
from server.test_images import FLAGS, GREEDY, client_of, ids_of
from server.vision_checkpoints import ask, image_part, picture, write_qwen3_vl
from vision.test_videos import file_of

from octavo.frontend.llm import LLM
from octavo.messages import SamplingParams


def video_part(data: bytes | str) -> dict[str, Any]:
    url = data if isinstance(data, str) else "data:video/mp4;base64," + base64.b64encode(data).decode()
    return {"type": "video_url", "video_url": {"url": url}}


def test_a_server_answers_of_videos_what_llm_answers(tmp_path: Path) -> None:
    """Alone, beside a picture, and as a file; in BF16, of a model that reads two videos a request."""
    path = tmp_path / "model"
    path.mkdir()
    write_qwen3_vl(path)
    first, second = (
        file_of("libx264", "mp4", frames=20, rate=5, size=(48, 64)),
        file_of("mpeg4", "avi", frames=9, size=(40, 40)),
    )
    (tmp_path / "a.avi").write_bytes(second)
    file = video_part((tmp_path / "a.avi").as_uri())
    text = {"type": "text", "text": "What is this?"}
    contents = [[video_part(first), text], [file, text], [image_part(picture(1)), video_part(second), text, file]]
    chats: list[Any] = [[{"role": "user", "content": content}] for content in contents]
    options: dict[str, Any] = dict(limit_mm_per_prompt={"video": 2}, allowed_local_media_path=str(tmp_path))
    llm = LLM(path, max_model_len=1024, threads=1, cpu_kv_cache_gib=0.1, device="cpu", **options)
    answers = llm.chat(chats, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    expected = [one.outputs[0].token_ids for one in answers]
    assert len({*map(tuple, expected)}) == 3
    del llm
    more = ("--limit-mm-per-prompt", "video=2", "--allowed-local-media-path", str(tmp_path))
    server = Server("--model", str(path), *FLAGS, *more)
    try:
        with client_of(server) as client:
            assert [ids_of(client, chat) for chat in chats] == expected
            counted: Any = client.post("/../tokenize", body={"messages": chats[2]}, cast_to=object)
            assert counted["tokens"] == answers[2].prompt_token_ids
            for content, sentence in (
                ([video_part(first[: len(first) // 2])], "A video is damaged or cut off"),
                ([video_part(b"#EXTM3U\nhttp://127.0.0.1/a.ts")], "of no format that is read here"),
                ([video_part("http://127.0.0.1/a.mp4")], "The video of .* cannot be fetched: .* no public address"),
                ([video_part(first)] * 3, "may have 2 videos here"),
                ([{"type": "video_url", "video_url": {}}], "should be like"),
                ([{"type": "video", "video": [[0]]}], "should have the video's URL"),
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    client.chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY)  # type: ignore[list-item]
                body: Any = caught.value.body
                assert re.search(sentence, body["message"]), body
                assert body["message"].endswith(".")
                assert body["param"] in ("messages", "messages.0.content.0")
            assert ids_of(client, ask(picture(2)))
    finally:
        server.stop()
