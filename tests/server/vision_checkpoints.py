"""Tiny checkpoints of text and images with all that a hub's directory has, and pictures to send."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.test_qwen3_vl import qwen3_vl
from PIL import Image
from transformers import PreTrainedModel

from octavo.demo import MODEL_DIR
from octavo.engine.core import EngineCore
from octavo.messages import EngineRequest, SamplingParams
from octavo.text.tokenizer import Tokenizer
from octavo.vision import image_reader, place_images, prepare

IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")  # from 4096 on
PAD = 4097
PREPROCESSOR = {
    "size": {"shortest_edge": 256, "longest_edge": 6400}, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip
# Of the form of Qwen3-VL's.
TEMPLATE = """
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.content is string %}{{- m.content }}
  {%- else %}
    {%- for part in m.content %}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        <|vision_start|><|image_pad|><|vision_end|>
      {%- elif part.type == 'video' or 'video' in part -%}
        <|vision_start|><|video_pad|><|vision_end|>
      {%- elif 'text' in part %}{{- part.text }}{%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def write_tokenizer(path: Path) -> None:
    """The demo's, with the tokens of images."""
    stored = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    more = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    stored["added_tokens"] += [dict(id=4096 + i, content=token, **more) for i, token in enumerate(IMAGE_TOKENS)]
    (path / "tokenizer.json").write_text(json.dumps(stored))
    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def write_qwen3_vl(path: Path) -> PreTrainedModel:
    """transformers' model, of values that BF16 holds exactly, so large that pictures matter and answers vary."""
    torch.manual_seed(0)
    model = qwen3_vl(vocab_size=4104, max_position_embeddings=1024)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4 if p.ndim > 1 and "layers" in name else 1).copy_(p.bfloat16().float())
    for i, name in enumerate(("vision_start", "image", "vision_end", "video")):
        setattr(model.config, f"{name}_token_id", 4096 + i)
    model.save_pretrained(path)
    write_tokenizer(path)
    return model


def picture(seed: int, rows: int = 40, columns: int = 56) -> Image.Image:
    """Noise over a gradient."""
    rng = np.random.default_rng(seed)
    base = np.linspace(0, 155, rows)[:, None, None] * rng.random(3) + rng.integers(0, 100, (rows, columns, 3))
    return Image.fromarray(base.astype(np.uint8))


def file_of(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    out = BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


def data_url(image: Image.Image | bytes, **how: Any) -> str:
    data = image if isinstance(image, bytes) else file_of(image, **how)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(image: Image.Image | bytes | str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image if isinstance(image, str) else data_url(image)}}


def ask(*images: Image.Image | bytes | str, text: str = "What is this?") -> list[dict[str, Any]]:
    """A chat of one message: the pictures, then the question."""
    return [{"role": "user", "content": [*map(image_part, images), {"type": "text", "text": text}]}]


def engine_says(core: EngineCore, path: Path, text: str, *images: Image.Image, count: int = 16) -> list[int]:
    """The tokens that the engine answers a rendered chat with, without a server."""
    reader = image_reader(path)
    assert reader is not None
    ids = Tokenizer(path).encode(text, add_special_tokens=False)
    made = [prepare(file_of(image), reader.processor) for image in images]
    prompt, placed = place_images(ids, made, reader.placeholder)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    core.add(EngineRequest("a", prompt, params, images=placed))
    found = list[int]()
    while core.has_work():
        found += [token for output in core.step()[0] for token in output.token_ids]
    assert len(found) == count
    return found
