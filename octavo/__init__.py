"""Octavo serves large language models in FP8.

from octavo import LLM, SamplingParams

llm = LLM("path/to/checkpoint", quantization="ptpc_fp8", kv_cache_dtype="fp8")
print(llm.generate(["def read(self"], SamplingParams(max_tokens=32))[0].outputs[0].text)
"""

from __future__ import annotations

from octavo.version import __version__

__all__ = ["LLM", "CompletionOutput", "OctavoError", "RequestOutput", "SamplingParams", "__version__"]

TYPE_CHECKING = False  # checkers take it for typing's, whose import would be most of this one's time
if TYPE_CHECKING:
    from typing import Any

    from octavo.errors import OctavoError
    from octavo.frontend.llm import LLM
    from octavo.frontend.outputs import CompletionOutput, RequestOutput
    from octavo.messages import SamplingParams

_HOMES = {
    "LLM": "octavo.frontend.llm",
    "CompletionOutput": "octavo.frontend.outputs",
    "RequestOutput": "octavo.frontend.outputs",
    "SamplingParams": "octavo.messages",
    "OctavoError": "octavo.errors",
}


def __getattr__(name: str) -> Any:  # lazily: `octavo --help` and the API process must not pay for torch
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute '{name}'")
