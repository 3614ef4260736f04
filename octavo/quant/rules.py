"""Which scheme a layer gets: the requested one, unless the user or the scheme's defaults exclude the layer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.errors import OctavoError
from octavo.quant.scheme import BF16, Scheme

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
    used: set[str] = field(default_factory=set)

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

    def check_used(self) -> None:
        """Raises OctavoError for a pattern that matched no module, because it is probably a typing error."""
        if self.scheme.quantized and (unused := [pattern for pattern in self.ignore if pattern not in self.used]):
            raise OctavoError(
                f"--quantization-ignore '{unused[0]}' matches no layer of this model; "
                "use a module name such as 'model.layers.0.mlp.down_proj', a glob or re:REGEX."
            )


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if name == pattern or name.endswith("." + pattern):
        return True
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)
