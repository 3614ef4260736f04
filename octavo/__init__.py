"""Octavo serves large language models in FP8.

from octavo import LLM, SamplingParams

llm = LLM("path/to/checkpoint", quantization="ptpc_fp8", kv_cache_dtype="fp8")
print(llm.generate(["def read(self"], SamplingParams(max_tokens=32))[0].outputs[0].text)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "OctavoError", "RequestOutput", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from octavo.engine.llm import LLM, CompletionOutput, RequestOutput
    from octavo.engine.request import SamplingParams
    from octavo.errors import OctavoError

_HOMES = {
    "LLM": "octavo.engine.llm",
    "CompletionOutput": "octavo.engine.llm",
    "RequestOutput": "octavo.engine.llm",
    "SamplingParams": "octavo.engine.request",
    "OctavoError": "octavo.errors",
}


def __getattr__(name: str) -> Any:  # lazily: `octavo --help` and the API process must not pay for torch
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute '{name}'")
