"""vLLM's flags that Octavo has no setting for, as data: the values that are taken, and the sentence for those that are not.

The command line and LLM answer by this table, and docs/coming-from-vllm.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from octavo.errors import OctavoError

__all__ = ["PEER_FLAGS", "PeerFlag", "judge", "peer_keyword"]

Accepts = tuple[str, ...] | Callable[[str], bool]


@dataclass(frozen=True)
class PeerFlag:
    """One flag, or several that get the same answer.

    names: its spellings. takes: how many values follow. so: values that say what Octavo does anyway, in lower case, or a check;
    "on" and "off" are a switch's. ignored: whether the other values are taken too, and named at start, because they change no
    answer. why: what Octavo does in place of what the flag asks for.
    """

    names: tuple[str, ...]
    takes: str  # "switch", "value" or "values"
    so: Accepts
    ignored: bool
    why: str

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its names and, of a switch, their negations."""
        negated = tuple(f"--no-{name[2:]}" for name in self.names if self.takes == "switch" and name.startswith("--"))
        return *self.names, *negated

    def is_so(self, value: str) -> bool:
        """Whether Octavo does what this value asks for."""
        if callable(self.so):
            return self.so(value)
        return value.lower() in self.so or any(
            _number(value) == number for one in self.so if (number := _number(one)) is not None
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def judge(flag: PeerFlag, spelled: str, values: list[str]) -> bool:
    """Whether the flag is to be named at start, as taken without effect. Raises OctavoError where a value is not served.

    spelled: the flag as it was given. values: what follows it; a switch's are ["on"] or ["off"].
    """
    if all(map(flag.is_so, values)) and (values or flag.ignored):
        return False
    if flag.ignored:
        return True
    shown = "" if flag.takes == "switch" else "".join(f" {value[:80]}" for value in values)
    raise OctavoError(f"{spelled}{shown} is not served: {flag.why}.")


def peer_keyword(name: str, value: Any) -> bool | None:
    """As `judge`, for a keyword argument of LLM's; None where vLLM has no such flag."""
    flag = BY_NAME.get("--" + name.replace("_", "-"))
    if flag is None:
        return None
    if value is None:
        return False
    if flag.takes == "switch":
        values = ["on" if value else "off"]
    else:
        listed = value if isinstance(value, (list, tuple)) else [value]
        values = [one if isinstance(one, str) else json.dumps(one, default=str) for one in listed]
    try:
        return judge(flag, name, values)
    except OctavoError:
        raise OctavoError(f"{name}={repr(value)[:80]} is not served: {flag.why}.") from None


def _rows(table: str, ignored: bool) -> Iterator[PeerFlag]:
    """A row a line: `--name -n =VALUE,VALUE | why`. What follows `=` is so already; `=` alone says that a value follows, `*`
    that several do, and neither that it is a switch."""
    for line in filter(None, map(str.strip, table.splitlines())):
        left, why = line.split(" | ")
        words = left.split()
        names = tuple(word for word in words if word.startswith("-"))
        rest = next((word for word in words if not word.startswith("-")), "")
        so = tuple(filter(None, rest.lstrip("=*").split(",")))
        if rest.startswith(("=", "*")):
            takes = "value" if rest.startswith("=") else "values"
        else:
            takes, so = "switch", (rest,) if rest else () if ignored else ("off",)
        yield PeerFlag(names, takes, so, ignored, why)


def _is_graph_setting(value: str) -> bool:
    """Whether a --compilation-config, or a level, leaves graphs on."""
    try:
        read = json.loads(value)
    except ValueError:
        return False
    if isinstance(read, int):
        return read > 0
    off = ("0", "NONE")
    asked = [read[key] for key in ("level", "mode", "cudagraph_mode") if key in read] if isinstance(read, dict) else [0]
    return not any(str(one).upper() in off for one in asked)


def _names_a_backend(value: str) -> bool:
    """Whether a --structured-outputs-config says only which library is to do it."""
    try:
        read = json.loads(value)
    except ValueError:
        return False
    return isinstance(read, dict) and {key for key, set_ in read.items() if set_} <= {"backend", "disable_fallback"}


# Taken whatever the value is, and named at start: they change how vLLM works, and no answer. A word at the end is what is so.
_IGNORED = """
--enable-chunked-prefill on | prompts are always computed in chunks
--async-scheduling on | a GPU's next step is always launched before the last one's tokens are read
--swap-space =0 | preempted requests are computed again, not swapped out
--scheduler-delay-factor --num-scheduler-steps --num-lookahead-slots --max-num-partial-prefills --max-long-partial-prefills \
--long-prefill-token-threshold --stream-interval --preemption-mode = | one way of scheduling, by --max-num-batched-tokens
--multi-step-stream-outputs --use-v2-block-manager --disable-async-output-proc --disable-chunked-mm-input \
--disable-hybrid-kv-cache-manager --scheduler-reserve-full-isl | one way of scheduling, by --max-num-batched-tokens
--guided-decoding-backend =auto,guidance | llguidance does all structured output
--guided-decoding-disable-fallback | llguidance does all structured output
--disable-custom-all-reduce --disable-nccl-for-dp-synchronization | ranks exchange by kernels where they can, else through NCCL
--attention-backend --attention-config --mm-encoder-attn-backend --moe-backend --linear-backend --kernel-config \
--all2all-backend --performance-mode =auto | kernels are chosen by the device, and the choice is logged
--disable-cascade-attn --kv-sharing-fast-prefill --enable-dbo --enable-eplb --eplb-log-balancedness | kernels and the place \
of experts are Octavo's own choice
--eplb-config --num-redundant-experts --eplb-window-size --eplb-step-interval --expert-placement-strategy \
--dbo-decode-token-threshold --dbo-prefill-token-threshold --ubatch-size = | kernels and the place of experts are Octavo's \
own choice
--max-cudagraph-capture-size --max-seq-len-to-capture --max-context-len-to-capture = | graphs are captured for all that \
--max-num-seqs allows
--cuda-graph-sizes --cudagraph-capture-sizes * | graphs are captured for all that --max-num-seqs allows
--mm-processor-cache-type --mm-shm-cache-max-object-size-mb --renderer-num-workers --mm-tensor-ipc = | \
images are prepared in side processes, and the tower's outputs are kept (--mm-processor-cache-gb)
--disable-mm-preprocessor-cache --skip-mm-profiling --enable-multimodal-encoder-data-parallel | images are prepared in side \
processes, and the tower's outputs are kept (--mm-processor-cache-gb)
--mamba-cache-dtype --mamba-ssm-cache-dtype --mamba-block-size --mamba-cache-mode --mamba-backend --gdn-prefill-backend = | \
no model that is served has such layers
--safetensors-load-strategy --model-loader-extra-config --max-parallel-loading-workers --pt-load-map-location = | \
safetensors are read by several threads
--ignore-patterns * | only safetensors are read
--use-tqdm-on-load on | loading shows its progress
--prefix-caching-hash-algo =sha256 | blocks of the prefix cache are told apart by a cryptographic hash
--code-revision = | no model's code is run
--skip-tokenizer-init | the tokenizer is read anyway; prompts of token ids are served beside texts
--data-parallel-rpc-port -dpp = | engines find their ports themselves
--headless on | hosts behind the first (--node-rank) never serve HTTP
--h11-max-incomplete-event-size --h11-max-header-count = | a request's head may have 64 KiB
--show-hidden-metrics-for-version = | /metrics hides none
--cp-kv-cache-interleave-size --dcp-kv-cache-interleave-size = | each rank has the whole context
--numa-bind | each rank chooses its threads and its memory itself
--numa-bind-nodes --numa-bind-cpus * | each rank chooses its threads and its memory itself
--enable-log-deltas on | answers are not logged
--cohere-format = | there are no endpoints in Cohere's form
--cohere-is-reasoning-model --enable-flash-late-interaction on | there are no endpoints in Cohere's form, and no scores
--enable-ep-weight-filter | each rank reads its own experts alone
--api-server-count -asc =1 | one process answers HTTP; start several servers behind a load balancer for more
--disable-frontend-multiprocessing | the engine runs in a process of its own
"""

# Served for the values that say what is so, and refused for others.
_SO = """
--enable-auto-tool-choice on | tool calls are always parsed, where a request has tools; it may send tool_choice "none"
--enable-reasoning on | thinking is always split from content; --reasoning-parser none leaves it there
--enable-prompt-tokens-details on | usage always counts cached tokens
--enable-request-id-headers on | every answer has an X-Request-Id
--enable-server-load-tracking on | running requests are always counted
--enable-tokenizer-info-endpoint on | it is always there
--exclude-tools-when-tool-choice-none on | tools of a request with tool_choice "none" are never shown to the model
--interleave-mm-strings on | images always stand where the message has them
--decode-context-parallel-size -dcp --prefill-context-parallel-size -pcp =1 | each rank has the whole context; split layers \
with --tensor-parallel-size
--data-parallel-backend -dpb =mp | engines are where --distributed-executor-backend puts their ranks; leave it out
--task =generate,auto | Octavo generates text, and serves no embeddings, scores or transcriptions
--runner =generate,auto | Octavo generates text, and serves no embeddings, scores or transcriptions
--convert =none,auto | Octavo generates text, and serves no embeddings, scores or transcriptions
--scheduling-policy =fcfs | requests are served in the order in which they come
--response-role =assistant | answers have the role assistant
--tokenizer-mode =auto,hf | Octavo reads tokenizer.json, as the mode auto does where there is one; leave it out
--config-format =auto,hf | Octavo reads config.json, not params.json; leave it out where the checkpoint has one
--model-impl =auto,vllm | Octavo has its own implementation of each model; leave it out
--logprobs-mode =raw_logprobs | log-probabilities are of the model's own logits, before penalties and temperature
--cpu-offload-gb --kv-offloading-size --offload-group-size --offload-num-in-group --offload-prefetch-step =0 | weights and \
KV cache are in the device's memory alone; make them smaller with --quantization ptpc_fp8 and --kv-cache-dtype fp8
--kv-offloading-backend --offload-backend =auto | weights and KV cache are in the device's memory alone; leave it out
--video-pruning-rate =0 | all tokens of a video are computed; send fewer frames
--worker-cls =auto | no code but Octavo's own is run; leave it out
--additional-config --external-parameters --mm-processor-kwargs --media-io-kwargs ={} | there is nothing that it could set; \
leave it out
"""

# Refused: what they ask for is not here. Of a switch the negation is so.
_REFUSED = """
--enable-lora --fully-sharded-loras --enable-lora-bias --specialize-active-lora --enable-tower-connector-lora | there are no \
LoRA adapters; merge the adapter into the weights
--max-loras --max-lora-rank --max-cpu-loras --lora-dtype --lora-extra-vocab-size --default-mm-loras \
--long-lora-scaling-factors --qlora-adapter-name-or-path = | there are no LoRA adapters; merge the adapter into the weights
--lora-modules --lora-target-modules --prompt-adapters * | there are no adapters; merge them into the weights
--enable-prompt-adapter | there are no adapters; merge them into the weights
--max-prompt-adapters --max-prompt-adapter-token = | there are no adapters; merge them into the weights
--speculative-config -sc --spec-method --spec-model --spec-tokens --speculative-model --num-speculative-tokens \
--speculative-draft-tensor-parallel-size --speculative-max-model-len --speculative-disable-by-batch-size \
--ngram-prompt-lookup-max --ngram-prompt-lookup-min --spec-decoding-acceptance-method --speculative-model-quantization = | \
there is no speculative decoding; leave it out
--kv-transfer-config --kv-events-config --ec-transfer-config --weight-transfer-config = | caches are not sent between \
servers; leave it out
--data-parallel-rank -dpn --data-parallel-start-rank -dpr --data-parallel-size-local -dpl --data-parallel-address -dpa = | \
one command starts all engines by --data-parallel-size, on its machine or, with --distributed-executor-backend ray, a cluster
--data-parallel-hybrid-lb --data-parallel-external-lb --data-parallel-multi-port-external-lb | one command starts all engines \
by --data-parallel-size, and shares requests out
--data-parallel-supervisor-port --dp-supervisor-probe-interval-s --dp-supervisor-probe-timeout-s \
--dp-supervisor-probe-failure-threshold = | one command starts and watches all engines, and a rank that \
hangs ends its engine (--engine-timeout)
--enable-elastic-ep | the number of ranks is that of the start
--enable-return-routed-experts | answers do not say which experts computed them
--reasoning-config = | thinking has no budget of its own; max_completion_tokens is for the whole answer
--fingerprint-mode --fingerprint-value = | there is no such setting of system_fingerprint
--grpc --tokens-only | Octavo speaks HTTP with OpenAI's API alone
--worker-use-ray --engine-use-ray | --distributed-executor-backend ray makes ranks actors of a Ray cluster; give that
--ray-workers-use-nsight | ranks are not profiled; use octavo bench profile
--worker-extension-cls --scheduler-cls --logits-processor-pattern --io-processor-plugin --tool-parser-plugin \
--reasoning-parser-plugin = | no code but Octavo's own is run
--logits-processors * | no code but Octavo's own is run; requests may send logit_bias, allowed_token_ids and bad_words
--tool-server = | no tools are run here; a client runs them
--otlp-traces-endpoint --collect-detailed-traces = | there is no tracing; /metrics has the times
--enable-layerwise-nvtx-tracing --kv-cache-metrics --cudagraph-metrics --enable-mfu-metrics --enable-per-request-metrics \
--enable-logging-iteration-details | it is not measured; /metrics lists what is
--kv-cache-metrics-sample = | it is not measured; /metrics lists what is
--profiler-config = | use octavo bench profile
--enable-log-outputs --log-error-stack --aggregate-engine-logging | answers and traces are not logged
--log-config-file --disable-access-log-for-endpoints = | there is no such setting of the log
--pooler-config --override-pooler-config = | Octavo generates text, and serves no embeddings or scores
--enable-prompt-embeds --enable-mm-embeds | prompts are texts, token ids and images, not embeddings
--quantization-param-path = | KV scales are the checkpoint's, or measured with --calculate-kv-scales
--override-attention-dtype --override-neuron-config = | there is no such setting; leave it out
--guided-decoding-disable-any-whitespace --guided-decoding-disable-additional-properties | a JSON schema's own words decide; \
set additionalProperties there
--disable-sliding-window | a model's sliding window is part of it; lower --max-model-len to the window for the same memory
--hf-config-path = | config.json is read from the model's directory; change values of it with --hf-overrides
--tokenizer-revision = | give the directory of the tokenizer's snapshot with --tokenizer
--enable-ssl-refresh | start the server again when a certificate changes
--return-tokens-as-token-ids | a request may send return_tokens_as_token_ids
--enable-force-include-usage | a request may send stream_options {"include_usage": true}
--trust-request-chat-template | a request cannot bring a chat template; give it with --chat-template
"""

_CHECKED = (
    PeerFlag(
        ("--compilation-config", "-O", "-cc", "--optimization-level"),
        "value",
        _is_graph_setting,
        False,
        "kernels are compiled ahead and graphs are captured always; use --enforce-eager for none, or leave it out",
    ),
    PeerFlag(
        ("--structured-outputs-config",),
        "value",
        _names_a_backend,
        False,
        "llguidance does all structured output, and only its backend may be named; --reasoning-parser is a flag of its own",
    ),
)

PEER_FLAGS = (*_rows(_IGNORED, True), *_rows(_SO, False), *_CHECKED, *_rows(_REFUSED, False))
BY_NAME = {name: flag for flag in PEER_FLAGS for name in flag.names}
