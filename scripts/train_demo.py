"""Train the embedded demo model on the running Python's own standard library.

    python scripts/train_demo.py --minutes 70 --output octavo/demo/model
    python scripts/train_demo.py --experts 16 --minutes 5 --device cuda --rows 32 --output DIRECTORY

Everything comes from the interpreter that runs the script: the library's sources and
the text behind ``help()``.  The result is a Hugging Face style Llama checkpoint in
BF16 with its tokenizer and a model card; ``heldout.txt`` goes beside the directory.
With ``--experts`` it is a Qwen3-MoE, which is not shipped: it measures what FP8 costs
a mixture of experts (``python -m bench.accuracy DIRECTORY``).
"""

import argparse
import json
import math
import os
import platform
import random
import sysconfig
import time
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from corpus import START, STOP
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_cache": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts_per_tok": 2,
    "moe_intermediate_size": 192, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "use_sliding_window": False,
}  # fmt: skip
BALANCE = 0.01  # weight of the loss that keeps experts equally busy
SHARD = 14_000_000  # bytes
SAMPLING = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.05,
    "eos_token_id": [0, 2], "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [
    "import os\n\ndef ",
    "class ",
    "def read(self",
    f"{START}user\nWrite a Python function: Return the absolute path of a file.{STOP}\n{START}assistant\n",
]


# --- model: attribute names spell out Hugging Face's tensor names ----------------------


def linear(rows, columns):
    return nn.Linear(columns, rows, bias=False)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, dim, head_norms):
        super().__init__()
        self.dim = dim
        if head_norms:
            self.q_norm, self.k_norm = nn.RMSNorm(dim, CONFIG["rms_norm_eps"]), nn.RMSNorm(dim, CONFIG["rms_norm_eps"])
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.q_proj, self.o_proj = linear(heads * dim, hidden), linear(hidden, heads * dim)
        self.k_proj, self.v_proj = linear(kv_heads * dim, hidden), linear(kv_heads * dim, hidden)

    def forward(self, x, cos, sin):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in projections)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj, self.up_proj = linear(inner, hidden), linear(inner, hidden)
        self.down_proj = linear(hidden, inner)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Every expert computes every token, which for small ones is the fastest way to train; the chosen ones count."""

    def __init__(self, c):
        super().__init__()
        hidden, inner, count = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
        self.chosen = c["num_experts_per_tok"]
        self.gate = linear(count, hidden)
        self.gate_proj, self.up_proj = (nn.Parameter(torch.empty(count, inner, hidden)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best, where = scores.topk(self.chosen, -1)
        weights = torch.zeros_like(scores).scatter(-1, where, best / best.sum(-1, keepdim=True))
        busy, likely = (weights > 0).float().mean((0, 1)), scores.mean((0, 1))
        self.balance = (busy * likely).sum() * len(busy) / self.chosen
        inner = F.silu(torch.einsum("bth,eih->btei", x, self.gate_proj)) * torch.einsum("bth,eih->btei", x, self.up_proj)
        return torch.einsum("btei,ehi->bth", inner * weights.unsqueeze(-1), self.down_proj)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = Attention(
            hidden, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], "num_experts" in c
        )
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.mlp = Experts(c) if "num_experts" in c else MLP(hidden, c["intermediate_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The decoder described by a config, with the embedding tied to the output."""

    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        for name, p in self.named_parameters():
            if p.ndim > 1:
                # Layers begin as the identity: their outputs are added to the residual.
                p.data.normal_(std=0 if "o_proj" in name or "down_proj" in name else c["initializer_range"])
        powers = torch.arange(0, c["head_dim"], 2) / c["head_dim"]
        positions = torch.arange(c["max_position_embeddings"])
        angles = torch.outer(positions, c["rope_theta"] ** -powers).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets=None):
        """Return the logits, or the mean cross entropy when there are targets."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def balance(self):
        """How unequally busy the experts were in the last forward; 1 a layer when all are equally."""
        return sum(layer.mlp.balance for layer in self.model.layers)


# --- training -------------------------------------------------------------------------


def orthogonalize(g):
    """Move the singular values of a batch of matrices near 1 (Newton-Schulz iteration)."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        # An odd quintic that lifts small singular values quickly; 1 need not be exact.
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose update is orthogonalized, for the matrices inside the layers."""

    def __init__(self, params, momentum=0.95, decay=0.1):
        shapes = {p.shape for p in params}
        self.groups = [[p for p in params if p.shape == shape] for shape in sorted(shapes)]
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, lr):
        """Update every matrix; equal shapes share one batched multiplication."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([p.grad for p in group])
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalize(grads.lerp(buffer, self.momentum))
            rows, columns = update.shape[-2:]
            update *= -lr * max(1, rows / columns) ** 0.5
            for p, change in zip(group, update, strict=True):
                p.mul_(1 - lr * self.decay).add_(change)


def rate(progress):
    """Return the learning rate's share of its peak: warm up, hold, then fall to zero."""
    return min(1, progress / 0.01, (1 - progress) / 0.6)


@torch.no_grad()
def perplexity(model, tokenizer, text, length=512):
    """Return (mean loss per token, bits per byte) over non-overlapping windows."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        total += model(window[None, :-1], window[None, 1:]).item() * (len(window) - 1)
    return total / (len(ids) - 1), total / math.log(2) / len(text.encode())


@torch.no_grad()
def complete(model, tokenizer, prompt, count=96):
    """Return the greedy continuation of a prompt."""
    ids = tokenizer.encode(prompt).ids
    prompt_length = len(ids)
    for _ in range(count):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token in SAMPLING["eos_token_id"]:
            break
        ids.append(token)
    return tokenizer.decode(ids[prompt_length:])


def write(path, data):
    """Write text, or a dict as JSON, so that readers see the old file or the new one."""
    text = data if isinstance(data, str) else json.dumps(data, indent=2) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def one_by_one(weights):
    """The tensors, stacks of experts as the hub has them: a matrix each."""
    out = {}
    for name, tensor in weights.items():
        at, _, matrix = name.rpartition(".")
        if tensor.ndim < 3:
            out[name] = tensor
        else:
            out |= {f"{at}.experts.{e}.{matrix}.weight": one.contiguous() for e, one in enumerate(tensor)}
    return out


def save(weights, output):
    """One file, or several with an index where one would be over SHARD bytes."""
    files, size = [{}], 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > SHARD and "num_experts" in CONFIG:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        where = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        write(output / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    for name, held in zip(names, files, strict=True):
        part = output / f"{name}.part"
        save_file(held, part, metadata={"format": "pt"})
        part.chmod(0o644)  # it is created for its owner alone
        os.replace(part, output / name)


def export(model, tokenizer, heldout, facts, output):
    """Round the weights to BF16, measure them, and write the checkpoint and its card."""
    weights = {n: p.detach().bfloat16().cpu() for n, p in model.state_dict().items()}
    rounded = Decoder(CONFIG)
    rounded.load_state_dict(weights)
    loss, bits = perplexity(rounded, tokenizer, heldout)
    samples = [(prompt, complete(rounded, tokenizer, prompt)) for prompt in PROMPTS]
    print(f"held out: loss {loss:.4f}, perplexity {math.exp(loss):.3f}, {bits:.4f} bits/byte")
    for prompt, answer in samples:
        print(f"--- {prompt!r}\n{answer}", flush=True)

    output.mkdir(parents=True, exist_ok=True)
    write(output / "config.json", CONFIG)
    write(output / "generation_config.json", SAMPLING)
    write(output / "tokenizer.json", tokenizer.to_str())
    write(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": corpus.CHAT_TEMPLATE,
            "eos_token": corpus.END, "pad_token": corpus.END, "add_bos_token": False,
            "additional_special_tokens": [START, STOP], "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    )  # fmt: skip
    licence = facts["library"] / "LICENSE.txt"
    if licence.exists():  # some distributions move it: then the copy in the repository stays
        write(output / "LICENSE-PSF.txt", licence.read_text("utf-8"))
    write(output.parent / "heldout.txt", heldout)
    save(one_by_one(weights), output)
    facts |= {"ppl": math.exp(loss), "loss": loss, "bits": bits, "kib": len(heldout.encode()) / 1024}
    parameters = sum(p.numel() for p in model.parameters())
    facts |= {
        "kind": "Qwen3-MoE" if "num_experts" in CONFIG else "Llama",
        "params": parameters / 1e6,
        "heldout": ", ".join(corpus.HELDOUT),
    }
    shown = "\n\n".join(f"Prompt:\n\n````\n{p}\n````\n\n````\n{a}\n````" for p, a in samples)
    write(output / "README.md", corpus.CARD.format(samples=shown, **facts))


def main():
    """Read the library, train for the given time and write the model directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=70, help="wall time of the training loop")
    parser.add_argument("--output", type=Path, default=Path("octavo/demo/model"))
    parser.add_argument("--every", type=float, default=5, help="minutes between exports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--lr", type=float, default=0.02, help="for the matrices (Muon)")
    parser.add_argument("--embedding-lr", type=float, default=3e-3, help="for the rest (AdamW)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=int, default=0, help="experts of a Qwen3-MoE; 0: a Llama")
    parser.add_argument("--python", default=platform.python_version(), help="the library's version, for the model card")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="Lib of a CPython")
    args = parser.parse_args()
    if args.experts:
        CONFIG.update(EXPERTS, num_experts=args.experts)
    torch.set_default_device(args.device)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    torch.set_float32_matmul_precision("high")
    library, tests, heldout = corpus.read_library(args.library)
    heldout = "\n".join(heldout)
    documents = library + list(corpus.topics.values()) + corpus.chat_documents(library, rng)
    tokenizer = corpus.train_tokenizer(documents, CONFIG["vocab_size"])
    windows = corpus.Windows(tokenizer, documents, tests, rng)
    print(f"{len(documents)} documents and {len(tests)} tests, tokens: {windows.sizes}")

    model = Decoder(CONFIG)
    routers = [p for n, p in model.named_parameters() if ".gate.weight" in n]
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim > 1 and ".gate.weight" not in n]
    others = routers + [p for p in model.parameters() if p.ndim == 1 or p is model.model.embed_tokens.weight]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    step_loss = torch.compile(model, dynamic=False)
    cuda = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    start, step, tokens, loss_mean, exported = time.monotonic(), 0, 0, None, 0.0
    while (minutes := (time.monotonic() - start) / 60) < args.minutes:
        progress = minutes / args.minutes
        # Short sequences are cheaper; the last stretch teaches the full range of positions.
        length = 512 if progress < 0.85 else 1024
        inputs, targets = map(torch.tensor, windows.batch(args.rows, length))
        loss = step_loss(inputs, targets)
        (loss + BALANCE * model.balance() if args.experts else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(args.lr * rate(progress))
        adam.param_groups[0]["lr"] = args.embedding_lr * rate(progress)
        adam.step()
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + inputs.numel()
        loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
        if step % (500 if cuda else 20) == 0:
            pace = tokens / (time.monotonic() - start)
            status = f"{minutes:6.2f} min, step {step}, loss {loss_mean:.4f}, {pace:.0f} tokens/s"
            print(status, flush=True)
        facts = {"minutes": args.minutes, "seed": args.seed, "rows": args.rows, "machine": machine, "python": args.python}
        facts |= {"tokens": tokens / 1e6, "steps": step, "train_loss": loss_mean, "library": args.library}
        facts["arithmetic"] = "TF32" if cuda else "FP32"
        if minutes - exported > args.every:
            exported = minutes
            export(model, tokenizer, heldout, facts, args.output)
    export(model, tokenizer, heldout, facts, args.output)


if __name__ == "__main__":
    main()
