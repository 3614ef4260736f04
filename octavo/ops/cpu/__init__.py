"""What a CPU prefers: codes held widened and multiplied by oneDNN, attention by request groups."""

from octavo.ops.cpu.attention import attention, write_kv
from octavo.ops.cpu.linear import Widened

__all__ = ["LINEAR", "attention", "write_kv"]

LINEAR = [Widened()]
