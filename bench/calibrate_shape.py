"""Time and peak memory of `octavo quantize --calibrate` of a published model's shape on one device.

    python -m bench.calibrate_shape --shape llama-3.1-8b --device cuda --directory /dev/shm

Weights are random, made on the device; the text is random token ids. The checkpoint, the result and the codes that are kept
until the end are files in DIRECTORY: twice the bytes of the model in BF16.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo.convert.calibration import WINDOW
from octavo.engine.calibration_text import TOKENS
from octavo.quant import SCHEMES, QuantRules
from octavo.tools.bench.workloads import shape_config
from octavo.tools.quantize.quantize import quantize_checkpoint


def write_llama(out: Path, config: dict[str, object], device: str) -> int:
    """A dense checkpoint of config's shape, one file a layer, of weights that are normal; gives its bytes."""
    sizes = {name: int(str(config[name])) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    hidden, inner, layers, vocab = sizes.values()
    heads, kv = (
        int(str(config[name])) * int(str(config["head_dim"])) for name in ("num_attention_heads", "num_key_value_heads")
    )
    shapes = {f"self_attn.{name}_proj": (rows, hidden) for name, rows in (("q", heads), ("k", kv), ("v", kv))}
    shapes |= {"self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    norms = "input_layernorm", "post_attention_layernorm"
    weight_map: dict[str, str] = {}
    total = 0

    def save(named: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        made = {
            name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02).add_(float(len(shape) == 1)).cpu()
            for name, shape in named.items()
        }
        save_file(made, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(made, file))
        total += sum(tensor.nbytes for tensor in made.values())

    save({"model.embed_tokens.weight": (vocab, hidden)})
    for i in range(layers):
        named: dict[str, tuple[int, ...]] = {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        save(named | {f"model.layers.{i}.{name}.weight": (hidden,) for name in norms})
    save({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--scheme", default="ptpc_fp8", choices=[name for name, scheme in SCHEMES.items() if scheme.quantized])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--directory", type=Path, help="default: the system's temporary directory")
    args = parser.parse_args()
    config = dict(shape_config(args.shape)) | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        model, out = Path(place) / "model", Path(place) / "out"
        model.mkdir()
        began = time.monotonic()
        total = write_llama(model, config, args.device)
        print(f"{total / 1e9:.2f} GB of BF16 weights written in {time.monotonic() - began:.1f} s", flush=True)
        windows = torch.randint(config["vocab_size"], (args.tokens // WINDOW, WINDOW)).tolist()
        on_device = torch.device(args.device).type == "cuda"
        if on_device:
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()

        def say(line: str) -> None:
            print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

        quantize_checkpoint(
            model, out, QuantRules(SCHEMES[args.scheme]), device=args.device, threads=args.threads, windows=windows, say=say
        )
        seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
        peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the device at most" if on_device else ""
        of = f"{args.shape}, {config['num_hidden_layers']} layers, {len(windows) * WINDOW:,} tokens"
        host = f"{used.ru_maxrss / 1e6:.1f} GB of the host with mapped files, {used.ru_utime + used.ru_stime:.0f} s of CPU time"
        print(f"{of}: {seconds:.1f} s{peak}, {host}, weights' making included")


if __name__ == "__main__":
    main()
