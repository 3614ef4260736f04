"""Triton's kernels on a machine without a GPU: interpreted by numpy, with two of the interpreter's conversions put right."""

from __future__ import annotations

import os

import numpy as np
import torch

__all__ = ["HAS_GPU"]

HAS_GPU = torch.cuda.is_available()


def _set_up() -> None:
    """Triton decides how a function will run when its module is imported: this must come first."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5: torch.float8_e5m2,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
    }

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> np.ndarray:
        """The interpreter's own loses the carry of a rounding: 124.27 became 64."""
        values = torch.from_numpy(np.ascontiguousarray(data)).view(dtypes[source]).to(torch.float32).to(dtypes[target])
        kind = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[target.primitive_bitwidth]
        return values.view(kind).numpy().view(f"uint{target.primitive_bitwidth}").reshape(data.shape)

    interpreter._convert_float = convert

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: object, a: object, b: object, *rest: object) -> object:
        """The interpreter keeps BF16 as the integers of its bits, and would multiply those."""
        wide = [
            interpreter.TensorHandle(convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)  # type: ignore[attr-defined]
            if x.dtype is tl.bfloat16  # type: ignore[attr-defined]
            else x
            for x in (a, b)
        ]
        return dot(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: object) -> None:
        """NumPy 2.4 no longer makes a number of an array with one element, which is what a loop's bound is here."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_lang_tensor


if not HAS_GPU:
    _set_up()
