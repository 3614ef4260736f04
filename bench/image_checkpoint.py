"""A checkpoint of text and images without weights, for --load-format dummy: the demo model's tokenizer and a small tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.demo import MODEL_DIR

__all__ = ["write"]

TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")  # from 4096 on
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 4097,
    "video_token_id": 4099,
    "vision_start_token_id": 4096,
    "vision_end_token_id": 4098,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4104, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 16384, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": True,
        "rope_scaling": {"mrope_section": [12, 10, 10], "rope_type": "default", "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 1, "out_hidden_size": 256, "patch_size": 16,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 2304, "in_channels": 3,
        "deepstack_visual_indexes": [0, 1], "hidden_act": "gelu_pytorch_tanh",
    },
}  # fmt: skip
PREPROCESSOR = {
    "size": {"shortest_edge": 65_536, "longest_edge": 4_194_304}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
)


def write(path: Path) -> None:
    """Writes it into a directory."""
    stored = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    more = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    stored["added_tokens"] += [dict(id=4096 + i, content=token, **more) for i, token in enumerate(TOKENS)]
    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    written = dict(config=CONFIG, preprocessor_config=PREPROCESSOR, tokenizer=stored, tokenizer_config=config)
    for name, values in written.items():
        (path / f"{name}.json").write_text(json.dumps(values))
