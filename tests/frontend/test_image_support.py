"""Why an engine reads images or does not, in a sentence that is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import cases

from octavo.config import EngineConfig
from octavo.frontend.image_support import image_support
from octavo.messages import EngineInfo
from octavo.server.chat_images import image_note

QWEN, KIMI, TEXT = ({"model_type": name} for name in ("qwen3_vl", "kimi_k25", "qwen3"))
OFF, ALONE = "Images are switched off here", "This model reads text alone"
CASES: list[tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], str, bool]] = [
    (QWEN, {}, {}, "", False),
    (KIMI, {"media_proc_cfg": {}}, {}, "", False),
    (QWEN, {}, {"language_model_only": True}, OFF, False),
    (QWEN, None, {"language_model_only": True}, OFF, False),
    (QWEN, {}, {"limit_mm_per_prompt": "image=0,video=0"}, OFF, False),
    (TEXT, {}, {}, ALONE, False),
    (TEXT, None, {"language_model_only": True}, ALONE, False),
    (QWEN, None, {}, "preprocessor_config.json is missing", True),
    (QWEN, {"patch_size": -3}, {}, "patch_size must be an integer over 0", True),
    (KIMI, {"media_proc_cfg": {"fixed_output_tokens": 5}}, {}, "fixed_output_tokens must be null", True),
]


@cases(("config", "preprocessor", "options", "refusal", "fault"), CASES)
def test_why(
    config: dict[str, Any],
    preprocessor: dict[str, Any] | None,
    options: dict[str, Any],
    refusal: str,
    fault: bool,
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    engine = EngineConfig(model=str(tmp_path), **options)
    tower = config is not TEXT and engine.reads_images
    found = image_support(engine, EngineInfo(100, 5000, 10, 16, config["model_type"], image_tokens=99 * tower))
    assert (found.reader is None, found.fault) == (bool(refusal), fault)
    assert refusal in found.refusal
    assert found.refusal.endswith(".") == bool(refusal)


VIDEOS: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"video_preprocessor_config.json": {"patch_size": -3}}, "video_preprocessor_config.json: patch_size must be an integer"),
    ({"video_preprocessor_config.json": {"image_mean": 1}}, "video_preprocessor_config.json: image_mean must be a list"),
    ({"video_preprocessor_config.json": {"do_resize": False}}, "video_preprocessor_config.json: do_resize must be True"),
    ({"video_preprocessor_config.json": {"fps": "2"}}, "video_preprocessor_config.json: fps must be a number"),
    ({"processor_config.json": {"video_processor": {"merge_size": 0}}}, "processor_config.json: merge_size must be an integer"),
    ({"preprocessor_config.json": {"num_frames": 8}}, "preprocessor_config.json: num_frames must be None"),
    ({"video_preprocessor_config.json": {}}, ""),
]


@cases(("files", "sentence"), VIDEOS, ids=str)
def test_what_is_wrong_with_videos_is_said_at_start(files: dict[str, dict[str, Any]], sentence: str, tmp_path: Path) -> None:
    for name, content in {"config.json": QWEN, "preprocessor_config.json": {}, **files}.items():
        (tmp_path / name).write_text(json.dumps(content))
    engine = EngineConfig(model=str(tmp_path))
    found = image_support(engine, EngineInfo(100, 5000, 10, 16, "qwen3_vl", image_tokens=99))
    assert found.reader is not None
    assert (found.videos is None, found.video_fault) == (bool(sentence), bool(sentence))
    note = image_note(engine, found)
    assert (note or "").startswith(f"videos are refused: {sentence}" if sentence else "")
    assert (note is None) == (not sentence)
    assert image_note(EngineConfig(model=str(tmp_path), limit_mm_per_prompt="video=0"), found) is None
