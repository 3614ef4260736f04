"""Triton's kernels on a machine without a GPU: interpreted by numpy, with two of the interpreter's conversions put right, and
without work that it does again for every call and every tensor, which took half of the time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from types import FunctionType, ModuleType, SimpleNamespace

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
    _once(interpreter)


def _once(interpreter: ModuleType) -> None:
    """Nothing here changes a value: what the interpreter finds out anew each time is kept."""
    import triton.language as tl

    patch = interpreter._patch_lang

    @cache
    def patch_for_good(*langs: ModuleType) -> None:
        patch(SimpleNamespace(__globals__=dict(enumerate(langs))))

    def patch_lang(fn: FunctionType) -> object:
        """The interpreter's own goes through every member of Triton's modules at every call from one function to another.

        Nothing in this process asks for what was there before."""
        patch_for_good(*(lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())))
        return interpreter._LangPatchScope()

    get_np_dtype, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: tl.dtype) -> np.dtype:
        """The interpreter's own makes a table of all dtypes to look one up. `name` is that of an element, or of a pointer."""
        if (name := dtype.scalar.name) not in known:
            known[name] = get_np_dtype(dtype)
        return known[name]

    @cache
    def block_of(*sizes: int) -> tuple[tl.tuple, int]:
        if not sizes:
            raise TypeError("a block without dimensions")
        return tl.tuple(sizes), tl.core.validate_block_shape(sizes)

    def of_a_block(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[int | tl.constexpr]) -> None:
        """As Triton's own, which checks each shape again, and writes a name that is read in messages only."""
        sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
        self.element_ty, (self.shape, self.numel) = element_ty, block_of(*sizes)

    @cache
    def shape_of(*sizes: int) -> tl.tuple:
        return tl.tuple([tl.constexpr(size) for size in sizes])

    def of_a_tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
        """As Triton's own, which makes a tuple of each tensor's shape."""
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = type.shape if type.is_block() else ()
        self.shape, self.numel = shape_of(*sizes), tl.constexpr(math.prod(sizes))

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = of_a_block, of_a_tensor
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.core._type_for_tuple_values = lambda values, fields=None: None  # which only the compiler reads


if not HAS_GPU:
    _set_up()
