"""The ops of CPUs: C kernels that read FP8 as stored. Without a C compiler: codes widened in memory, oneDNN and torch."""

from octavo.ops.contract import LinearImplementation, StackImplementation
from octavo.ops.cpu.attention import attention, write_kv
from octavo.ops.cpu.experts import NativeStack, WidenedStack
from octavo.ops.cpu.latent import expanded_attention
from octavo.ops.cpu.library import missing
from octavo.ops.cpu.linear import Widened
from octavo.ops.cpu.native import Native

__all__ = ["LINEAR", "STACKS", "attention", "expanded_attention", "write_kv"]

LINEAR: list[LinearImplementation] = [Native(), Widened()]
STACKS: list[StackImplementation] = [NativeStack(), WidenedStack()]

if missing() is None:
    from octavo.ops.cpu.experts import combine, dispatch, route
    from octavo.ops.cpu.latent import (
        absorbed_queries,
        head_linear,
        latent_attention,
        select_keys,
        write_index_keys,
        write_latent,
    )
    from octavo.ops.cpu.native import (
        add_gram,
        argmax,
        attention,
        captures,
        descend,
        rms_norm,
        rope_write_kv,
        rotate,
        round_columns,
        round_keys,
        sample,
        scale_errors,
        silu_mul,
        write_kv,
    )
    from octavo.ops.cpu.op_recorder import capture

    __all__ += [
        "absorbed_queries", "add_gram", "argmax", "capture", "captures", "combine", "descend", "dispatch", "head_linear",
        "latent_attention", "rms_norm", "rope_write_kv", "rotate", "round_columns", "round_keys", "route", "sample",
        "scale_errors", "select_keys", "silu_mul", "write_index_keys", "write_latent",
    ]  # fmt: skip
