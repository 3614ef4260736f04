"""Why an engine reads images or does not, in a sentence that is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import cases

from octavo.config import EngineConfig
from octavo.frontend.image_support import image_support
from octavo.messages import EngineInfo

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
