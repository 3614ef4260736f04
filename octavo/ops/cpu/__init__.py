"""What a CPU prefers: C kernels that read FP8 as it is; without them, codes held widened, oneDNN and torch."""

from octavo.ops.contract import LinearImplementation, StackImplementation
from octavo.ops.cpu.attention import attention, write_kv
from octavo.ops.cpu.experts import NativeStack, WidenedStack
from octavo.ops.cpu.library import missing
from octavo.ops.cpu.linear import Widened
from octavo.ops.cpu.native import Native

__all__ = ["LINEAR", "STACKS", "attention", "write_kv"]

LINEAR: list[LinearImplementation] = [Native(), Widened()]
STACKS: list[StackImplementation] = [NativeStack(), WidenedStack()]

if missing() is None:
    from octavo.ops.cpu.experts import combine, dispatch, route
    from octavo.ops.cpu.native import attention, captures, draw, likeliest, rms_norm, rope_write_kv, rotate, silu_mul, write_kv
    from octavo.ops.cpu.op_recorder import capture

    __all__ += [
        "capture", "captures", "combine", "dispatch", "draw", "likeliest", "rms_norm", "rope_write_kv", "rotate", "route",
        "silu_mul",
    ]  # fmt: skip
