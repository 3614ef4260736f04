"""Rounding a checkpoint's linear layers by what a text makes them read: the layers in order, one in memory.

Each layer reads what the layers before it give in the model's own dtype, so that it runs once over the text. (What they give
in FP8 made calibration no better: bench/LOG.md.) Its codes go to a file of their own, beside the state that the next layer
reads, so that a run that is stopped continues behind the last whole layer. The files that the checkpoint is made of take their
codes from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo import ops
from octavo.convert.cache_scales import SCALES, CacheScales
from octavo.convert.calibrated_layer import CalibratedLayer, Loss, State, together
from octavo.convert.key_rounding import Rounding, write_key_rounding
from octavo.convert.output_directory import StashBytes
from octavo.convert.output_file import write_error
from octavo.convert.quantize_plan import Piece, Plan
from octavo.distributed import TensorParallel
from octavo.host import keep
from octavo.layers.attention import PagedAttention
from octavo.models import build_model
from octavo.models.common import DecoderLM
from octavo.models.interface import ModelInput, StageState
from octavo.platform import Platform
from octavo.weights.checkpoint import DTYPES

__all__ = ["WINDOW", "LayerLosses", "Stash", "calibrate", "stash_bytes"]

KEYS = "key_influence", "key_order"  # of a layer, beside its codes and the scales of its cache
ENDS = tuple(f".{name}" for name in SCALES)
KEPT = 1 << 30  # freed bytes that a CPU's layers use again, instead of clearing other pages
WINDOW = 512  # tokens of text that attend to each other

LayerLosses = dict[str, Loss]


class Stash:
    """Codes and scales of the layers that are done, by module, and the state of every batch of text behind the last of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("layer-*.safetensors")):
            self._note(path)

    def done(self) -> int:
        """Layers that need not be computed again."""
        return max((int(path.stem.removeprefix("state-")) for path in self.folder.glob("state-*.safetensors")), default=0)

    def _note(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self._files |= {name.removesuffix(".weight"): path for name in file.keys() if name.endswith((".weight", *ENDS))}  # noqa: SIM118

    def get(self, module: str) -> tuple[Tensor, Tensor] | None:
        """Codes e4m3fn [N, K] and scales FP32, on the host; None of a module that nothing was measured for."""
        if module not in self._files:
            return None
        with safe_open(self._files[module], "pt") as file:
            return file.get_tensor(f"{module}.weight"), file.get_tensor(f"{module}.weight_scale")

    def cache_scale(self, name: str) -> Tensor:
        """The scale tensor of this name, FP32, on the host."""
        with safe_open(self._files[name], "pt") as file:
            return cast("Tensor", file.get_tensor(name))

    def said_of_scales(self, scales: CacheScales) -> str:
        """What was written of the scales of an FP8 cache, or why nothing was."""
        if scales.without:
            return f"no KV scales written: {scales.without}"
        found = [torch.cat([self.cache_scale(f"{module}.{name}").flatten() for module in scales.heads]) for name in SCALES]
        keys, values = (f"{float(each.min()):.3g} to {float(each.max()):.3g}" for each in found)
        each = "KV head" if scales.by_head else "layer"
        return f"KV scales of each {each}, which --kv-cache-dtype fp8 uses: keys {keys}, values {values}"

    def said_of(self, plan: Plan, windows: Sequence[Sequence[int]]) -> str:
        """How many of the matrices that the output has in FP8 were calibrated, and by how many tokens."""
        made = sum(not piece.is_kept and piece.module in self._files for piece in plan.quantized)
        return f"{made} of {len(plan.quantized)} matrices calibrated by {sum(map(len, windows)):,} tokens"

    def losses(self, number: int) -> LayerLosses:
        with safe_open(self.folder / _layer_name(number), "pt") as file:
            return {name: Loss(**values) for name, values in json.loads(file.metadata()["losses"]).items()}

    def write_key_rounding(self, path: Path) -> None:
        """Writes how the layers' keys are rounded; nothing where no layer has keys of its own."""
        layers: dict[int, Rounding] = {}
        for number in range(self.done()):
            with safe_open(self.folder / _layer_name(number), "pt") as file:
                if KEYS[0] in file.keys():  # noqa: SIM118
                    layers[number] = file.get_tensor(KEYS[0]), file.get_tensor(KEYS[1])
        if layers:
            write_key_rounding(path, layers)

    def states(self, count: int) -> list[State]:
        """Of every batch, behind `count` layers."""
        with safe_open(self.folder / f"state-{count:04d}.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return [_state(tensors, i) for i in range(int(file.metadata()["states"]))]

    def put(self, number: int, layer: CalibratedLayer, states: Sequence[State]) -> None:
        """Keeps what layer `number` gave. Whoever is stopped in between computes the layer again."""
        made = {f"{name}.weight": codes for name, (codes, _) in layer.made.items()}
        made |= {f"{name}.weight_scale": scale for name, (_, scale) in layer.made.items()}
        made |= dict(zip(KEYS, layer.key_rounding or (), strict=False)) | layer.cache_scales
        losses = {name: asdict(loss) for name, loss in layer.losses.items()}
        self._write(_layer_name(number), made, {"losses": json.dumps(losses)})
        self._note(self.folder / _layer_name(number))
        behind = {f"{i}.{field}": tensor for i, state in enumerate(states) for field, tensor in _tensors(state)}
        self._write(f"state-{number + 1:04d}.safetensors", behind, {"states": str(len(states))})
        (self.folder / f"state-{number:04d}.safetensors").unlink(missing_ok=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        path = self.folder / name
        partial = path.with_name(name + ".partial")
        try:
            self.folder.mkdir(exist_ok=True)
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, partial, metadata)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise write_error(error, path, sum(tensor.nbytes for tensor in tensors.values())) from None


def stash_bytes(plan: Plan, config: Mapping[str, Any], windows: Sequence[Sequence[int]]) -> StashBytes:
    """What `calibrate` writes to a stash, and how keys are rounded to a file beside it, about. Arguments: as there."""
    if not windows:
        return StashBytes()
    model = cast("DecoderLM", build_model(config, TensorParallel(), 1))
    made = (out for piece in plan.quantized if not piece.is_kept for out in piece.outputs())
    codes = sum(prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in made)
    attention = (module for module in model.modules() if isinstance(module, PagedAttention))
    rounding = sum(4 * one.kv_heads * one.head_dim * (one.head_dim + 1) for one in attention)
    state = sum(map(len, windows)) * model.config.hidden_size * 2 * torch.bfloat16.itemsize  # the output and the residual
    return StashBytes(codes + 2 * rounding, min(2, model.config.num_hidden_layers - 1) * state)


def calibrate(
    plan: Plan,
    config: Mapping[str, Any],
    windows: Sequence[Sequence[int]],
    platform: Platform,
    stash: Stash,
    threads: int,
    tell: Callable[[int, int, LayerLosses], None],
) -> None:
    """Fills `stash` with the codes of `plan`'s matrices, by the inputs that `windows` of token ids give them.

    config: config.json's, of an architecture that Octavo serves. tell: learns of each layer its number, how many there are, and
    what it loses. Matrices that no token of text reads, such as a vision tower's, are not in the stash.
    """
    with _threads(threads):
        ops.bind(platform)
        if platform.is_cpu:
            keep(KEPT)
        longest = max(map(len, windows))
        batches = together(windows, platform.device)
        pieces: dict[str, Piece] = {piece.module: piece for piece in plan.quantized if not piece.is_kept}
        whole = build_model(config, TensorParallel(), longest)
        count: int = cast("DecoderLM", whole).config.num_hidden_layers
        done = stash.done()
        for number in range(done):
            tell(number, count, stash.losses(number))
        states = [_to(state, platform.device) for state in stash.states(done)] if 0 < done < count else []
        for number in range(done, count):
            layer = CalibratedLayer(plan.checkpoint.directory, config, number, longest, platform, pieces, plan.cache_scales)
            try:
                if not number:
                    states = [layer.embed(batch) for batch in batches]
                made = layer.quantize(batches, states)
                states = [] if number + 1 == count else [cast("State", state) for state in made]
            finally:
                layer.close()
            stash.put(number, layer, states)
            tell(number, count, layer.losses)
            del layer  # before the next is loaded
            if not platform.is_cpu:
                platform.release()
        platform.release()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _layer_name(number: int) -> str:
    return f"layer-{number:04d}.safetensors"


def _tensors(state: State) -> list[tuple[str, Tensor]]:
    named = [("x", state.x)] + ([("residual", state.residual)] if isinstance(state, StageState) else [])
    return named + [(f"extras.{i}", tensor) for i, tensor in enumerate(state.extras)]


def _state(tensors: Mapping[str, Tensor], number: int) -> State:
    at = f"{number}."
    extras = tuple(tensors[f"{at}extras.{i}"] for i in range(sum(name.startswith(f"{at}extras.") for name in tensors)))
    x, residual = tensors[f"{at}x"], tensors.get(f"{at}residual")
    return ModelInput(x, extras) if residual is None else StageState(x, residual, extras)


def _to(state: State, device: torch.device) -> State:
    moved = [tensor.to(device) for tensor in state.extras]
    if isinstance(state, StageState):
        return StageState(state.x.to(device), state.residual.to(device), tuple(moved))
    return ModelInput(state.x.to(device), tuple(moved))
