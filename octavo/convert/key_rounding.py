"""Rounding keys of an FP8 cache by what queries read of them: measured by calibration, kept beside the checkpoint's files.

The file is safetensors inside, under a name by which no other reader takes it for weights.

Attention reads of a key k what the queries q of its head's group make of it, so rounding it to k' loses (k' - k) H (k' - k)^T
with H the sum of q q^T. Dimensions are rounded one after the other, and what each loses is carried into those that are still to
come, as LDLQ (arXiv:2307.13304) does with weights. The codes' bytes and meaning are those of plain rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from octavo.convert.compensated import factor, in_order, is_finite, symmetric
from octavo.convert.output_file import write_error
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING

__all__ = ["Rounding", "key_rounding", "read_key_rounding", "write_key_rounding"]

DAMPING = 0.01  # of H's diagonal: keys have few dimensions, of which a text of some thousand tokens tells enough
TAKE = "write it with octavo quantize --calibrate, or --save-quantized DIR --calibrate, or leave --kv-cache-rounding out"

Rounding = tuple[Tensor, Tensor]  # influence and order, as octavo.kvcache.KeyRounding has them, of all KV heads


def key_rounding(grams: Tensor) -> Rounding:
    """Of H, FP32 [kv_heads, D, D], whose upper triangles count. A head whose H has no factor is rounded to nearest."""
    influence = torch.zeros_like(grams)
    orders = torch.arange(grams.shape[1], device=grams.device).repeat(len(grams), 1)
    for head, gram in enumerate(grams):
        order, h = in_order(symmetric(gram.clone()))
        if is_finite(h) and (found := factor(h, DAMPING)) is not None:
            orders[head] = order
            influence[head][:, order] = found
    return influence, orders.int()


def write_key_rounding(path: Path, layers: Mapping[int, Rounding]) -> None:
    """Writes a file that is either there as a whole or not there, of layers by their numbers."""
    tensors = {f"{n}.{name}": t for n, made in layers.items() for name, t in zip(("influence", "order"), made, strict=True)}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(error, path, sum(tensor.nbytes for tensor in tensors.values())) from None


def read_key_rounding(directory: Path, numbers: range) -> list[Rounding]:
    """Of these layers of the checkpoint in `directory`. Raises OctavoError where it has none, or none of some of them, and for
    values that no calibration writes: kernels take `order` for indices."""
    path = directory / KEY_ROUNDING
    if not path.is_file():
        raise OctavoError(f"--kv-cache-rounding calibrated needs {KEY_ROUNDING}, which {directory} does not have; {TAKE}.")
    try:
        with safe_open(path, "pt") as file:
            found = [(file.get_tensor(f"{n}.influence"), file.get_tensor(f"{n}.order")) for n in numbers]
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{path} cannot be read ({error}); {TAKE}.") from None
    for n, rounding in zip(numbers, found, strict=True):
        if (fault := _fault(*rounding)) is not None:
            raise OctavoError(f"{path} holds no rounding of layer {n}'s keys: {fault}; {TAKE}.")
    return found


def _fault(influence: Tensor, order: Tensor) -> str | None:
    """What is wrong with a layer's tensors in themselves; their sizes are compared with the model's by who takes them."""
    if influence.dtype is not torch.float32 or order.dtype is not torch.int32:
        return f"influence is {influence.dtype} and order {order.dtype}, and not torch.float32 and torch.int32"
    if order.ndim != 2 or influence.shape != (*order.shape, order.shape[-1]):
        return f"influence has shape {[*influence.shape]} and order {[*order.shape]}, not [heads, D, D] and [heads, D]"
    if not bool((order.sort(-1).values == torch.arange(order.shape[-1])).all()):
        return "order does not name each dimension once"
    return None if bool(influence.isfinite().all()) else "influence has NaN or infinity"
