"""--hf-overrides: values in place of config.json's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError
from octavo.models import architecture

__all__ = ["overridden"]

_ROPE = ("rope_scaling", "rope_parameters")  # older and newer files' names of the same
_NOT_OF_THE_MODEL = ("model_type", "architectures", "quantization_config", "compression_config", "vision_config")


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json with `overrides` in place. Raises OctavoError for one that changes nothing of the model."""
    changed = _merged(config, overrides or {})
    for name, value in (overrides or {}).items():
        if name in _NOT_OF_THE_MODEL:
            raise OctavoError(f"--hf-overrides cannot change {name}, which the checkpoint's tensors follow; leave it out.")
        if config.get(name) == value:
            continue
        others = {other: given for other, given in (overrides or {}).items() if other != name}
        if _made_of(changed) == _made_of(_merged(config, others)):
            nested = ' it may belong into {"text_config": ...}, or' if "text_config" in config else ""
            raise OctavoError(
                f"--hf-overrides: {name} changes nothing that model_type '{config.get('model_type')}' is made of;{nested} "
                "leave it out."
            )
    return changed


def _made_of(config: Mapping[str, Any]) -> Any:
    return architecture(config).Config.from_json(config)


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Objects are merged, but settings of the rotary embedding replaced: those of one type mean nothing to another."""
    out = dict(config)
    for name, value in overrides.items():
        within = out.get("rope_parameters")
        if name in _ROPE:
            kept = {key: old for key, old in (within or {}).items() if key in ("rope_theta", "partial_rotary_factor")}
            for one in _ROPE:
                out.pop(one, None)
            out["rope_parameters"] = {**kept, **value} if isinstance(value, Mapping) else value or kept
        elif name == "rope_theta" and isinstance(within, Mapping):
            out["rope_parameters"] = {**within, name: value}
        elif isinstance(value, Mapping) and isinstance(out.get(name), Mapping):
            out[name] = _merged(out[name], value)
        else:
            out[name] = value
    return out
