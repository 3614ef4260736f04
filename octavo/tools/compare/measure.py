"""How far a quantized model is from the same model in BF16, measured on a text.

The text is cut into windows, each a prompt of its own, prefilled through the paged cache, so that the cache's dtype counts as
in serving. With --decode-activations the second half of each is read by decode steps instead, since prompts say nothing of
them, and only its positions count. Every position but the last predicts the token after it. With p the BF16 model's
distribution there and q the variant's, over the whole vocabulary:

    perplexity   exp(mean of -log q(next token)), next tokens as the text has them
    KL           mean of sum over v of p(v) log(p(v) / q(v)), in nats a token; 0 only where q = p
    top-1        share of positions at which p and q have the same likeliest token
    greedy       mean number of equal tokens before the first that differs, when both continue the same prompts greedily

The full p is never stored. What is kept of the BF16 model are its hidden states after the last norm, [tokens, hidden], and its
head, from which p is computed again, a few rows at a time: exact, and vocab / hidden times smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.kv_setup import SCALED
from octavo.engine.runner import ModelRunner
from octavo.errors import OctavoError
from octavo.messages import EngineRequest, SamplingParams
from octavo.models.interface import Head
from octavo.quant import SCHEMES, WeightDType
from octavo.tools.compare.caches import own_kv
from octavo.tools.compare.read_text import states_of
from octavo.weights.load_report import GroupReport

__all__ = [
    "REFERENCE",
    "Measurement",
    "Reference",
    "Text",
    "Variant",
    "cut",
    "divergence",
    "measure",
    "open_core",
    "score",
]

LOGIT_VALUES = 1 << 22  # logits computed at a time, of each model: 16 MiB in FP32
PROMPTS, PROMPT_TOKENS, GREEDY_TOKENS = 8, 32, 64


@dataclass(frozen=True)
class Variant:
    """One way to serve the model: canonical names of scheme and KV dtype, and what stays in BF16 beside the user's own list.

    kv: `auto` is the model's own dtype, with which it is compared; of its --kv-cache-dtype auto that may be another.
    calibrated: the checkpoint whose codes are served, of a model that was calibrated; "" for the user's own.
    decode: --decode-activations.
    """

    scheme: str = "bf16"
    kv: str = "auto"
    ignore: tuple[str, ...] = ()
    calibrated: str = ""
    decode: str = "auto"

    def config(self, base: EngineConfig) -> EngineConfig:
        """The user's configuration with this variant's scheme, cache and ignore list."""
        quantized = SCHEMES[self.scheme].quantized
        ignore = (*base.quantization_ignore, *self.ignore) if quantized else ()
        return replace(
            base,
            model=self.calibrated or base.model,
            quantization=self.scheme,
            kv_cache_dtype=own_kv(base) if self.kv == "auto" else self.kv,
            kv_cache_rounding=base.kv_cache_rounding if self.kv in SCALED else "nearest",
            quantization_ignore=tuple(dict.fromkeys(ignore)),
            quantize_lm_head=base.quantize_lm_head and quantized,
            quantization_config=None,
            decode_activations=self.decode,
        )


REFERENCE = Variant()


@dataclass(frozen=True)
class Text:
    """Token ids to measure on: windows to predict, and prompts to continue greedily."""

    windows: list[list[int]]
    prompts: list[list[int]]
    greedy: int  # tokens to continue each prompt with
    decoded_from: int = 0  # the token of a window from which on it is read by decode steps; 0: all of it is a prompt

    @property
    def predictions(self) -> int:
        return sum(len(window) - 1 - self.decoded_from for window in self.windows)

    @property
    def decoded(self) -> int:
        """Tokens of a window that are read by decode steps."""
        return len(self.windows[0]) - self.decoded_from if self.decoded_from else 0

    @property
    def longest(self) -> int:
        """Positions that the longest window, or a prompt with its continuation, takes."""
        return max(len(self.windows[0]), len(self.prompts[0]) + self.greedy)


@dataclass(frozen=True)
class Measurement:
    """What one variant costs. Perplexity's change is relative to BF16's, with its standard error over positions."""

    variant: Variant
    perplexity: float
    change: float
    change_error: float
    kl: float  # nats a token
    kl_p99: float  # of single positions
    top1: float  # 0 to 1
    greedy: float  # equal tokens, at most Text.greedy
    weight_bytes: int  # as stored
    quantized_values: int  # weights held in FP8
    kv_bytes_per_token: int
    kl_error: float = 0.0  # standard error over positions
    weights_as_stored: bool = False  # in codes that the checkpoint has, which the scheme leaves as they are

    def memory(self, context: int) -> int:
        """Bytes of the weights and of one request of `context` tokens."""
        return self.weight_bytes + context * self.kv_bytes_per_token

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values.pop("variant"), **values}


@dataclass
class Reference:
    """The BF16 model as far as it is needed to compare with: hidden states on the host, head, greedy continuations."""

    head: Head
    hidden: list[Tensor] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    groups: dict[tuple[str, str], GroupReport] = field(default_factory=dict)  # of the weights, as they are loaded

    @classmethod
    def of(cls, core: EngineCore, text: Text) -> Reference:
        """Runs the reference model over the text."""
        hidden = [found.cpu() for found in states_of(core.runner, text.windows, text.decoded_from)]
        return cls(core.runner.model.head, hidden, _continue(core, text), core.runner.report.groups)


def cut(ids: Sequence[int], window: int, tokens: int | None, longest: int, *, decoded: bool = False) -> Text:
    """Windows of `window` tokens from all over `ids`, `tokens` in all (None: everything); `longest` is the model's context.

    decoded: whether the second half of each is read by decode steps.
    """
    window = min(window, longest, len(ids))
    if window < 4 and decoded:
        raise OctavoError(
            "The second half of a window of fewer than 4 tokens predicts nothing; give a longer --window or text."
        )
    if window < 2:
        raise OctavoError("The text has fewer than 2 tokens, so there is nothing to predict; give a longer one with --text.")
    room = len(ids) // window
    count = room if tokens is None else max(1, min(room, tokens // window))
    starts = [i * room // count * window for i in range(count)]
    prompt = min(PROMPT_TOKENS, window // 2)
    places = range(0, len(ids) - prompt + 1, max(1, (len(ids) - prompt) // PROMPTS))
    prompts = [list(ids[at : at + prompt]) for at in places[:PROMPTS]]
    windows = [list(ids[at : at + window]) for at in starts]
    return Text(windows, prompts, min(GREEDY_TOKENS, longest - prompt), window // 2 if decoded else 0)


def open_core(base: EngineConfig, variant: Variant, text: Text) -> EngineCore:
    """The engine of a variant, with a cache for the text's longest window."""
    sizes = dict(max_model_len=text.longest, max_num_seqs=PROMPTS, enable_prefix_caching=False)
    return EngineCore(replace(variant.config(base), **sizes))  # type: ignore[arg-type]


def measure(base: EngineConfig, variant: Variant, text: Text, reference: Reference) -> Measurement:
    """Loads a variant and runs it over the text."""
    core = open_core(base, variant, text)
    hidden = states_of(core.runner, text.windows, text.decoded_from)
    return score(variant, core.runner, hidden, _continue(core, text), text, reference)


def score(
    variant: Variant,
    runner: ModelRunner,
    hidden: Iterable[Tensor],
    greedy: Sequence[list[int]],
    text: Text,
    reference: Reference,
) -> Measurement:
    """What a variant costs, by its hidden states of each window and its continuation of each prompt."""
    parts = [
        divergence(reference.head, expected, runner.model.head, found, window[text.decoded_from :], runner.platform.device)
        for window, expected, found in zip(text.windows, reference.hidden, hidden, strict=True)
    ]
    before, after, kl, same = torch.cat(parts, 1).double()
    excess = after - before
    ratio = float(excess.mean().exp())
    counts = [_common(a, b) for a, b in zip(reference.greedy, greedy, strict=True)]
    return Measurement(
        variant,
        perplexity=float(after.mean().exp()),
        change=ratio - 1,
        change_error=ratio * float(excess.std(correction=0)) / math.sqrt(len(excess)),
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1=float(same.mean()),
        greedy=sum(counts) / len(counts),
        weight_bytes=runner.report.total("stored"),
        quantized_values=runner.report.total("values", WeightDType.FP8),
        kv_bytes_per_token=runner.bytes_per_token,
        kl_error=float(kl.std(correction=0)) / math.sqrt(len(kl)),
        weights_as_stored=_as_stored(runner.report.groups, reference.groups) and not variant.calibrated,
    )


def _as_stored(groups: Mapping[tuple[str, str], GroupReport], reference: Mapping[tuple[str, str], GroupReport]) -> bool:
    """Whether weights are those of the reference, and some of them codes."""
    return groups == reference and any(group.dtype is not WeightDType.BF16 for group in groups.values())


@torch.inference_mode()
def divergence(
    p_head: Head, p_hidden: Tensor, q_head: Head, q_hidden: Tensor, window: Sequence[int], device: torch.device
) -> Tensor:
    """[4, tokens - 1] on the host, FP32: -log p and -log q of the next token, KL(p || q), and 1 where the top tokens agree."""
    targets = torch.tensor(window[1:], device=device)
    rows = max(1, LOGIT_VALUES // q_head.shape[0])
    parts = []
    for at in range(0, len(targets), rows):  # both in the same chunks: a product's last bits may depend on its row count
        part = slice(at, min(at + rows, len(targets)))
        p, q = p_head(p_hidden[part].to(device)), q_head(q_hidden[part].to(device))
        losses = [logits.logsumexp(-1) - logits.gather(1, targets[part, None])[:, 0] for logits in (p, q)]
        parts.append(torch.stack([*losses, _kl(p, q), (p.argmax(-1) == q.argmax(-1)).float()]))
    return torch.cat(parts, 1).cpu()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of rows of logits. With d = p - q and m its mean under softmax(p), KL = log E_p[exp(m - d)].

    Unlike the textbook sum this takes no difference of large numbers, so FP32 resolves a KL of 1e-9.
    """
    weight, d = p.softmax(-1), p - q
    for _ in range(2):  # of a large mean, the first time leaves a rounding
        d -= (weight * d).sum(-1, keepdim=True)
    return (weight * torch.expm1(-d)).sum(-1).log1p()


def _continue(core: EngineCore, text: Text) -> list[list[int]]:
    """What follows each prompt greedily, all prompts in one batch."""
    params = SamplingParams(temperature=0.0, max_tokens=text.greedy, ignore_eos=True)
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(text.prompts))}
    for name, prompt in zip(outputs, text.prompts, strict=True):
        core.add(EngineRequest(name, prompt, params))
    while core.has_work():
        for output in core.step()[0]:
            if output.error is not None:
                raise OctavoError(output.error)
            outputs[output.request_id] += output.token_ids
    return list(outputs.values())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
