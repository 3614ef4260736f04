"""Parses config.json into a typed Config."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Self

from octavo.errors import OctavoError
from octavo.layers.rope import longest_context, rope_parameters

__all__ = ["ConfigBase", "check_experts", "check_fields", "expert_activations", "part_of"]

LARGEST = 1 << 31  # upper bound of any size
MOST = 1 << 127  # of any other number: kernels take them in FP32
_MAX_SIZES = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1 << 14) | {
    "num_hidden_layers": 4096
}  # far more than any model has: larger numbers would take minutes before the checkpoint could contradict them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigBase:
    """The fields that every dense decoder has in config.json, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    also_called: ClassVar[Mapping[str, str]] = {}  # a field -> its other name in config.json files
    may_be_zero: ClassVar[frozenset[str]] = frozenset()  # counts for which 0 is allowed
    default_theta: ClassVar[float] = 10000.0  # where config.json has no rope_theta
    partial_rotary: ClassVar[float] = 1.0  # where config.json has no partial_rotary_factor
    rotated_name: ClassVar[str] = "head_dim"  # the field that counts the dimensions available for rotation

    @property
    def longest_context(self) -> int:
        """The context length that the model was made for, including RoPE scaling."""
        return longest_context(self.max_position_embeddings, self.rope)

    @property
    def rotated(self) -> int:
        """The number of a head's dimensions that are rotated, the first ones (partial rotary embedding)."""
        return int(self.head_dim * (self.rope.get("partial_rotary_factor") or self.partial_rotary))

    @property
    def rotated_of(self) -> int:
        """The number of dimensions available for rotation."""
        return self.head_dim

    @property
    def mlp_activations(self) -> int:
        """MLP workspace in values per token: gate, up, their product, and one more of that size for quantization."""
        return 4 * self.intermediate_size

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Raises OctavoError that names the field if one is missing, of a wrong type or not supported."""
        config = {**{name: config.get(other) for name, other in cls.also_called.items()}, **config}
        values = {
            f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None and f.name != "rope"
        }
        try:
            values.setdefault("num_key_value_heads", config["num_attention_heads"])
            values.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        except (KeyError, TypeError, ZeroDivisionError):
            pass  # reported below
        check_fields(cls, values, cls.may_be_zero)
        made = cls(**values, rope=rope_parameters({"rope_theta": cls.default_theta, **config}))
        made.check()
        return made

    def check(self) -> None:
        """Raises OctavoError for contradictory or unsupported values."""
        if self.hidden_act != "silu":
            raise OctavoError(f"config.json asks for hidden_act '{self.hidden_act}'; this architecture is served with 'silu'.")
        if self.rotated_of % 2:
            raise OctavoError(
                f"config.json: {self.rotated_name} must be even, since pairs of dimensions are rotated, not {self.rotated_of}."
            )
        if self.rotated % 2 or not 0 < self.rotated <= self.rotated_of:
            raise OctavoError(
                f"config.json: {self.rotated} of a head's {self.rotated_of} dimensions cannot be rotated; "
                "it must be an even number of them."
            )
        kinds = getattr(self, "layer_types", ())
        if kinds and not (isinstance(kinds, list) and len(kinds) == self.num_hidden_layers):
            raise OctavoError(f"config.json: layer_types must list one type for each of the {self.num_hidden_layers} layers.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise OctavoError("config.json: num_attention_heads must be a multiple of num_key_value_heads.")


def part_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object `name` within config.json. Raises OctavoError where it is missing or is no object."""
    found = config.get(name)
    if found is None:
        raise OctavoError(f"config.json has no {name}, which this architecture needs.")
    if not isinstance(found, Mapping):
        raise OctavoError(f"config.json: {name} must be an object, not {found!r}.")
    return found


def check_fields(
    cls: type, values: dict[str, Any], may_be_zero: Collection[str] = (), spelled: Callable[[str], str] = str
) -> None:
    """Raises OctavoError, naming the field, for one of a dataclass that is missing in `values`, or whose value is wrong.

    Integers where a float is wanted become one. spelled: where config.json has a field, and under which name.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = spelled(field.name)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in values:
            if required:
                raise OctavoError(f"config.json has no {name}, which this architecture needs.")
            continue
        value, kind = values[field.name], _plain(hints[field.name])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            values[field.name] = float(value) if abs(value) < MOST else math.inf
        elif kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise OctavoError(f"config.json: {name} must be of type {kind.__name__}, not {value!r}.")
        elif kind is int and value > _MAX_SIZES.get(field.name, LARGEST):
            raise OctavoError(f"config.json: {name} is {value}, which no model has.")
        elif kind is int and value < (0 if field.name in may_be_zero else 1):
            raise OctavoError(f"config.json: {name} must be positive, not {value}.")
        if kind is float and not 0 < values[field.name] < MOST:
            raise OctavoError(f"config.json: {name} must be a positive number, not {value}.")


def expert_activations(chosen: int, inner: int, hidden: int) -> int:
    """As ConfigBase.mlp_activations, for the `chosen` experts of a token and their outputs."""
    return chosen * (4 * inner + hidden)


def check_experts(experts: int, chosen: int, groups: int = 1, chosen_groups: int = 1) -> None:
    """Raises OctavoError where a token cannot be routed to this many experts."""
    if experts % groups or chosen_groups > groups or chosen > experts // groups * chosen_groups:
        of_groups = f" of {chosen_groups} of {groups} groups" if groups > 1 else ""
        raise OctavoError(f"config.json: a token cannot be sent to {chosen} of {experts} experts{of_groups}.")


def _plain(hint: Any) -> type | None:
    """The class that a value with this annotation must have; None where it is not a single one."""
    if isinstance(hint, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not types.NoneType]
        hint = kinds[0] if len(kinds) == 1 else None
    return hint if hint in (int, float, bool, str) else None
