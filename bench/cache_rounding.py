"""What an FP8 cache costs a Llama if keys are rounded by what queries read: KL to exact keys and values, in plain torch.

    python -m bench.cache_rounding DIRECTORY        # SmolLM2's checkpoint, which bench.calibration makes

With H the sum of q q^T over the rotated queries of a key-value head, a key's columns are rounded one after the other, and what
each loses is carried into those to come (LDLQ, as for weights: octavo/convert/compensated.py). FP32, codes of scale 1.0; H is
of the calibration text, KL of the demo model's held-out text, in windows of 512.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.demo import HELDOUT
from octavo.engine.calibration_text import calibration_windows
from octavo.text.tokenizer import Tokenizer

WINDOW, DAMPING = 512, 0.01
KeysAndValues = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


class Llama:
    """Its forward over whole windows, with a place to change keys and values [B, heads, T, D] and to look at queries."""

    def __init__(self, directory: Path):
        self.w = {name: w.float() for name, w in load_file(directory / "model.safetensors").items()}
        self.config = config = json.loads((directory / "config.json").read_text())
        self.dim, self.kv = config["hidden_size"] // config["num_attention_heads"], config["num_key_value_heads"]
        theta = config["rope_parameters"]["rope_theta"]
        angles = torch.arange(WINDOW)[:, None] * theta ** -(torch.arange(0, self.dim, 2) / self.dim)
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        epsilon: float = self.config["rms_norm_eps"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * self.w[f"{name}.weight"]

    def linear(self, at: str, name: str, x: Tensor) -> Tensor:
        w: Tensor = self.w[f"{at}{name}_proj.weight"]
        return x @ w.T

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        out: Tensor = x * self.cos + torch.cat([-second, first], -1) * self.sin
        return out

    @torch.inference_mode()
    def run(self, ids: Tensor, change: KeysAndValues | None = None, grams: list[Tensor] | None = None) -> Tensor:
        """Hidden states [tokens, hidden] of windows [B, T]; grams: gets H [heads, D, D] of each layer."""
        x, later = self.w["model.embed_tokens.weight"][ids], torch.full((WINDOW, WINDOW), -torch.inf).triu(1)
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            linear = partial(self.linear, at)
            y = self.norm(x, at + "input_layernorm")
            q, k, v = (linear(f"self_attn.{n}", y).unflatten(-1, (-1, self.dim)).transpose(1, 2) for n in "qkv")
            q, k = self.rotate(q).unflatten(1, (self.kv, -1)), self.rotate(k)
            if grams is not None:
                grams.append(torch.einsum("bghtd,bghte->gde", q, q))
            if change is not None:
                k, v = change(layer, k, v)
            scores = torch.einsum("bghtd,bgsd->bghts", q, k) * self.dim**-0.5 + later
            out = torch.einsum("bghts,bgsd->bghtd", scores.softmax(-1), v).flatten(1, 2).transpose(1, 2).flatten(2)
            x = x + linear("self_attn.o", out)
            y = self.norm(x, at + "post_attention_layernorm")
            x = x + linear("mlp.down", torch.nn.functional.silu(linear("mlp.gate", y)) * linear("mlp.up", y))
        return self.norm(x, "model.norm").flatten(0, 1)

    def divergence(self, exact: Tensor, found: Tensor) -> str:
        head = self.w["model.embed_tokens.weight"].T
        parts = []
        for a, b in zip(exact.split(256), found.split(256), strict=True):
            p, q = (a @ head).log_softmax(-1), (b @ head).log_softmax(-1)
            parts.append((p.exp() * (p - q)).sum(-1))
        kl = torch.cat(parts)
        return f"{float(kl.mean()):.5f} ±{float(kl.std()) / len(kl) ** 0.5:.5f}"


class Carried:
    """Rounds one head's keys: columns by H's diagonal, the errors of the first `columns` of them carried into the rest."""

    def __init__(self, gram: Tensor, columns: int):
        h = gram.double()
        self.order, self.columns = h.diagonal().argsort(descending=True), columns
        h = h[self.order][:, self.order]
        h.diagonal().mul_(1 + DAMPING).add_(1e-4 * h.diagonal().mean())
        lower = torch.linalg.cholesky(h.flip(0, 1))
        self.influence = (lower / lower.diagonal()).flip(0, 1).triu(1).float()

    def __call__(self, k: Tensor) -> Tensor:
        exact = k.flatten(0, 1).T[self.order]
        offset, values = torch.zeros_like(exact), torch.empty_like(exact)
        for i, column in enumerate(exact):
            values[i] = rounded(column - offset[i])
            if i < self.columns:
                offset.addr_(self.influence[i], values[i] - column)
        out = torch.empty_like(values)
        out[self.order] = values
        return out.T.view(k.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, to measure on")
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--columns", type=int, nargs="*", default=[64], help="whose errors are carried")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, grams = Llama(args.model), list[Tensor]()
    model.run(torch.tensor(calibration_windows(args.model, "default", args.calibration_windows * WINDOW)), grams=grams)
    ids = Tokenizer(args.model).encode(HELDOUT.read_text("utf-8"))
    text = torch.tensor([ids[4 * i * WINDOW : (4 * i + 1) * WINDOW] for i in range(args.windows)])
    exact = model.run(text)
    ways: dict[str, KeysAndValues] = {"values alone": lambda layer, k, v: (k, rounded(v))}
    ways["to nearest"] = lambda layer, k, v: (rounded(k), rounded(v))
    for columns in args.columns:
        heads = [[Carried(gram, columns) for gram in layer] for layer in grams]
        ways[f"carried from {columns}"] = lambda layer, k, v, heads=heads: (  # type: ignore[misc]
            torch.stack([head(k[:, i]) for i, head in enumerate(heads[layer])], 1),
            rounded(v),
        )
    for name, change in ways.items():
        print(f"{name:>16}: KL {model.divergence(exact, model.run(text, change))}", flush=True)


if __name__ == "__main__":
    main()
