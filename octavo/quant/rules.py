"""Which scheme a layer gets: the requested one, unless the user or the scheme's defaults exclude the layer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.errors import OctavoError
from octavo.quant.scheme import BF16, Granularity, Scheme

__all__ = ["QuantRules"]


@dataclass
class QuantRules:
    """The requested scheme and the modules that it excludes.

    A pattern is a module's checkpoint name ("model.layers.0.mlp.down_proj"), a trailing part of one ("down_proj"), a glob
    of either ("model.layers.0.*", "experts.*.down_proj") or "re:" and a regular expression that must match from the name's
    start, as in compressed-tensors. Raises OctavoError for a regular expression that does not compile.
    """

    scheme: Scheme = BF16
    ignore: Sequence[str] = ()
    quantize_lm_head: bool = False
    head_scheme: Scheme | None = None  # of lm_head, if it differs from `scheme`
    exact_few: bool = False  # whether activations of few tokens stay as they are (Scheme.with_exact_few)
    used: set[str] = field(default_factory=set)
    served_exactly: set[str] = field(default_factory=set)  # modules whose activations `exact_few` concerns

    def __post_init__(self) -> None:
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise OctavoError(f"--quantization-ignore '{pattern}' is not a regular expression: {error}.") from None

    def ignored(self, name: str) -> bool:
        """Whether a pattern excludes the module `name`."""
        hits = {pattern for pattern in self.ignore if _matches(pattern, name)}  # all hits, because unused ones are reported
        self.used |= hits
        return bool(hits)

    def scheme_for(self, names: Sequence[str], *, is_head: bool = False) -> Scheme:
        """The scheme of the layer that stacks the modules `names`. Excluding one module excludes the stack."""
        left_out = [self.ignored(name) for name in names]  # all names, because unused patterns are reported
        if any(left_out) or (is_head and not self.quantize_lm_head):
            return BF16
        return (is_head and self.head_scheme) or self.scheme

    def of_activations(self, name: str, stored: Scheme) -> Scheme:
        """The scheme of the stored weight at `name` with activations as these rules ask. Raises OctavoError where they cannot
        be so."""
        if not self.exact_few or stored.activation is None:
            return stored
        if stored.activation is not Granularity.ROW:
            raise OctavoError(
                f"--decode-activations bf16 is for ptpc_fp8 and fp8, and {name} is in {stored.name}; leave it out."
            )
        self.served_exactly.add(name)
        return stored.with_exact_few

    def check_used(self) -> None:
        """Raises OctavoError for a pattern that matched no module, because it is probably a typing error."""
        if self.scheme.quantized and (unused := [pattern for pattern in self.ignore if pattern not in self.used]):
            raise OctavoError(
                f"--quantization-ignore '{unused[0]}' matches no layer of this model; "
                "use a module name such as 'model.layers.0.mlp.down_proj', a glob or re:REGEX."
            )

    def check_activations(self) -> None:
        """Raises OctavoError where activations were to stay as they are that no module has in FP8."""
        if self.exact_few and not self.served_exactly:
            raise OctavoError(
                "--decode-activations bf16 changes nothing here: no weight is multiplied by activations in FP8; add "
                "--quantization ptpc_fp8, or leave it out."
            )


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if name == pattern or name.endswith("." + pattern):
        return True
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)
