"""The one configuration of an engine. Command-line flags are derived from its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from octavo.errors import OctavoError
from octavo.option_checks import check_options
from octavo.option_types import typed
from octavo.option_values import (
    EXECUTORS,
    MAX_MEDIA,
    ROUNDINGS,
    SPELLINGS,
    canonical,
    layer_names,
    read_json_option,
    read_media_limits,
    with_rope,
)
from octavo.quantization_file import merged, read_quantization_config

__all__ = ["IGNORED", "IMAGES", "EngineConfig", "config_fields", "flag_of"]

# Headings under which the command line shows the fields.
MODEL, QUANTIZATION, MEMORY = "model", "quantization and KV cache", "memory and scheduling"
NODES, IMAGES = "several hosts", "images and videos"
IGNORED = "taken from vLLM's command line, without effect"


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of EngineConfig that the command line shows with `help`.

    metadata: `group`, the heading it stands under; `values` or `metavar`, what may follow it; `short`, another spelling;
    `alone`, the value of the flag where nothing follows it.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All settings of an engine. Raises OctavoError on a wrong value."""

    model: str = option("", "the same as MODEL", group=MODEL, metavar="MODEL")
    revision: str | None = option(
        None, "branch, tag or commit of a name of the hub, or of a model's folder in its cache (default: main)", group=MODEL
    )
    download_dir: str | None = option(
        None, "cache that names of the hub are downloaded to (default: the hub's own)", group=MODEL, metavar="DIR"
    )
    tokenizer: str | None = option(
        None, "directory of the tokenizer and the chat template (default: the model's)", group=MODEL, metavar="DIR"
    )
    hf_overrides: str | Mapping[str, Any] | None = option(
        None, "values in place of config.json's, such as '{\"max_position_embeddings\": 65536}'", group=MODEL, metavar="JSON"
    )
    rope_scaling: str | Mapping[str, Any] | None = option(
        None, "how positions are scaled, in place of config.json's rope_scaling", group=MODEL, metavar="JSON"
    )
    rope_theta: float | None = option(None, "base of the rotary embedding, in place of config.json's", group=MODEL)
    generation_config: str = option(
        "auto",
        "whose generation_config.json says how to sample by default: auto is the model's, vllm is nobody's",
        group=MODEL,
        metavar="{auto,vllm,DIR}",
    )
    override_generation_config: str | Mapping[str, Any] | None = option(
        None,
        "sampling by default, in place of generation_config.json's, such as '{\"temperature\": 0.6}'",
        group=MODEL,
        metavar="JSON",
    )
    max_logprobs: int = option(20, "most log-probabilities of a token that a request may ask for", group=MODEL)
    dtype: str = option("auto", "of activations and unquantized weights", group=MODEL, values=("auto", "bfloat16", "float32"))
    device: str = option("auto", "where the model runs", group=MODEL, values=("auto", "cuda", "cpu"))
    load_format: str = option(
        "auto", "auto reads safetensors, dummy makes random weights up", group=MODEL, values=("auto", "dummy")
    )
    quantization: str | None = option(
        None,
        "of weights that the checkpoint has in BF16: fp8 has one scale a matrix, ptpc_fp8 one a channel and one a token of "
        "activations, fp8_block one a tile of 128 x 128; fp8_w8a16 is ptpc_fp8 with activations as they are: as fast for few "
        "tokens, as slow as bf16 for long prompts (default: as the checkpoint is stored)",
        group=QUANTIZATION,
        values=("bf16", "fp8", "ptpc_fp8", "fp8_block", "fp8_w8a16"),
        short="-q",
    )
    quantization_ignore: tuple[str, ...] = option(
        (),
        "layers to keep in BF16: a name, a glob, or re:REGEX over the checkpoint's module names",
        group=QUANTIZATION,
        metavar="LAYER",
    )
    quantize_lm_head: bool = option(
        False, "quantize lm_head too; with tied embeddings, the one matrix of both", group=QUANTIZATION
    )
    quantization_config: str | None = option(
        None,
        "what `octavo compare --auto` wrote: its scheme, KV cache dtype and layers to keep in BF16",
        group=QUANTIZATION,
        metavar="FILE",
    )
    decode_activations: str = option(
        "auto", "bf16: as they are in products of up to 32 tokens, FP8 in larger", group=QUANTIZATION, values=("auto", "bf16")
    )
    save_quantized: str | None = option(
        None,
        "where a checkpoint of the quantized weights is kept: written once, and read by the starts that follow",
        group=QUANTIZATION,
        metavar="DIR",
    )
    calibrate: str | None = option(
        None,
        "what the weights of --save-quantized are calibrated by when they are written, which takes minutes: a UTF-8 file, or "
        "Octavo's own text, which is default, or no FILE",
        group=QUANTIZATION,
        metavar="FILE",
        alone="default",
    )
    kv_cache_dtype: str = option(
        "auto",
        "auto is the model's own, fp8 means fp8_e4m3 (MLA's is fp8_ds_mla)",
        group=QUANTIZATION,
        values=("auto", "bfloat16", "fp8", "fp8_e5m2", "fp8_per_token_head"),
    )
    kv_cache_dtype_skip_layers: tuple[str, ...] = option(
        (),
        "layers whose KV cache stays in the model's own dtype: their numbers, or sliding_window",
        group=QUANTIZATION,
        metavar="LAYER",
    )
    kv_cache_rounding: str = option("nearest", "of FP8 keys; calibrated: by --calibrate", group=QUANTIZATION, values=ROUNDINGS)
    calculate_kv_scales: bool = option(False, "measure the FP8 KV scales at start instead of using 1.0", group=QUANTIZATION)
    max_model_len: int | None = option(
        None,
        "longest prompt plus output in tokens (default, and auto: the model's own, or what fits)",
        group=MEMORY,
        unset=("auto", "-1"),
    )
    gpu_memory_utilization: float = option(0.9, "part of the accelerator's memory to use, 0 to 1", group=MEMORY)
    cpu_kv_cache_gib: float | None = option(
        None, "KV cache on a CPU in GiB (default: 4, or half of the memory that is available if that is less)", group=MEMORY
    )
    kv_cache_memory_bytes: int | None = option(
        None, "bytes of KV cache on each device, in place of --gpu-memory-utilization", group=MEMORY
    )
    num_gpu_blocks_override: int | None = option(None, "blocks of KV cache, in place of as many as fit", group=MEMORY)
    block_size: int | None = option(None, "tokens in a block of KV cache (default: 64, on a CPU 16)", group=MEMORY)
    max_num_seqs: int = option(256, "most requests in one step", group=MEMORY)
    max_num_batched_tokens: int | None = option(None, "most tokens in one step (default: 8192, on a CPU 512)", group=MEMORY)
    enable_prefix_caching: bool = option(True, "share the KV blocks of equal prompt prefixes", group=MEMORY)
    tensor_parallel_size: int = option(1, "accelerators that one layer is split over", group=MEMORY, short="-tp")
    pipeline_parallel_size: int = option(1, "stages that the layers are split over", group=MEMORY, short="-pp")
    data_parallel_size: int = option(
        1, "engines that share the requests out, each with devices, weights and a cache of its own", group=MEMORY, short="-dp"
    )
    enable_expert_parallel: bool = option(
        False, "with several ranks, each has some of the experts whole, not a part of each", group=MEMORY, short="-ep"
    )
    enforce_eager: bool = option(False, "never capture graphs", group=MEMORY)
    threads: int | None = option(None, "CPU threads (default: all cores this process may use)", group=MEMORY)
    seed: int = option(0, "seed of the requests that bring none", group=MEMORY)
    nnodes: int = option(1, "hosts that one engine's ranks are on, as many on each", group=NODES, short="-n")
    node_rank: int = option(0, "which of them this one is; 0 serves HTTP, the others compute for it", group=NODES, short="-r")
    master_addr: str = option("127.0.0.1", "address of host 0, as the others reach it", group=NODES, metavar="ADDRESS")
    master_port: int = option(29501, "port of host 0 at which the others come", group=NODES)
    distributed_timeout_seconds: int = option(600, "for which hosts wait for one another at start", group=NODES)
    distributed_executor_backend: str | None = option(
        None,
        "mp: ranks are this command's processes; ray: a Ray cluster's actors; uni: mp, of one rank",
        group=NODES,
        values=EXECUTORS,
    )
    trust_remote_code: bool = option(False, "Octavo never runs a model's code", group=IGNORED)
    limit_mm_per_prompt: str | Mapping[str, int] | None = option(
        None,
        'most images and videos of a request, such as \'{"image": 4, "video": 0}\' (default: 999)',
        group=IMAGES,
        metavar="JSON",
    )
    language_model_only: bool = option(False, "serve text alone: the vision tower is not loaded", group=IMAGES)
    mm_processor_cache_gb: float | None = option(
        None, "GiB of outputs of the vision tower to keep for images that come again (default: 4, on a CPU 0.5)", group=IMAGES
    )
    mm_encoder_tp_mode: str = option(
        "weights",
        "with several ranks, weights splits the vision tower, data gives each rank all of it and some of the images",
        group=IMAGES,
        values=("weights", "data"),
    )
    allowed_local_media_path: str | None = option(
        None, "directory below which file:// URLs of images may lie (default: none are read)", group=IMAGES, metavar="DIR"
    )
    allowed_media_domains: tuple[str, ...] = option(
        (), "the only hosts that URLs of images may name (default: all public ones)", group=IMAGES, metavar="HOST"
    )

    def block_size_on(self, cpu: bool) -> int:
        """Tokens per block: a GPU reads a block of 64 whole; a CPU gains nothing from more than 16."""
        return self.block_size or (16 if cpu else 64)

    def step_tokens_on(self, cpu: bool) -> int:
        """Most tokens in one step (max_num_batched_tokens)."""
        return self.max_num_batched_tokens or (512 if cpu else 8192)

    @property
    def text_directory(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer or self.model

    @property
    def num_ranks(self) -> int:
        """Processes of one engine, each of which has a device."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_devices(self) -> int:
        """Accelerators that all engines take together."""
        return self.num_ranks * self.data_parallel_size

    @property
    def devices_here(self) -> int:
        """Those of them that are this host's."""
        return self.num_devices // self.nnodes

    @property
    def media_limits(self) -> Mapping[str, int]:
        """Most images and videos of a request, by "image" and "video"."""
        found = self.limit_mm_per_prompt
        assert not isinstance(found, str)
        limits = {"image": MAX_MEDIA, "video": MAX_MEDIA, **(found or {})}
        return dict.fromkeys(limits, 0) if self.language_model_only else limits

    @property
    def reads_images(self) -> bool:
        """Whether the vision tower is wanted, if the model has one."""
        return any(self.media_limits.values())

    def encoder_cache_bytes(self, cpu: bool) -> int:
        """Bytes of the vision tower's outputs that are kept (mm_processor_cache_gb)."""
        given = self.mm_processor_cache_gb
        return int((given if given is not None else 0.5 if cpu else 4.0) * 2**30)

    def sampling_bytes(self, vocab: int) -> int:
        """An upper bound on the memory of a step's logits and of sampling."""
        return self.max_num_seqs * vocab * 4 * 6

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, value in typed(self).items():
            put(name, value)
        if not self.model:
            if self.revision is not None:
                raise OctavoError("--revision is for a name of the hub; give that too, or leave it out.")
            from octavo.demo import MODEL_DIR

            put("model", str(MODEL_DIR))
        if self.quantization_config is not None:
            for name, value in merged(self, read_quantization_config(self.quantization_config)).items():
                put(name, value)
        if self.max_model_len in (-1, "auto"):  # in Python; the command line has taken them already
            put("max_model_len", None)
        put("override_generation_config", read_json_option("--override-generation-config", self.override_generation_config))
        put("hf_overrides", with_rope(self.hf_overrides, self.rope_scaling, self.rope_theta))
        shown = {one.name: {value: value for value in one.metadata.get("values", ())} for one in fields(self)}
        for name, known in ({name: values for name, values in shown.items() if values} | SPELLINGS).items():
            if (given := getattr(self, name)) is not None:
                put(name, canonical(flag_of(name), given, known))
        for name in ("quantization_ignore", "allowed_media_domains", "kv_cache_dtype_skip_layers"):
            given = getattr(self, name)
            put(name, (given,) if isinstance(given, str) else tuple(given))
        put("kv_cache_dtype_skip_layers", layer_names(self.kv_cache_dtype_skip_layers))
        put("limit_mm_per_prompt", read_media_limits(self.limit_mm_per_prompt))
        check_options(self)


def flag_of(name: str) -> str:
    """The command-line spelling of a field: `max_model_len` -> `--max-model-len`."""
    return "--" + name.replace("_", "-")


def config_fields() -> tuple[Field[Any], ...]:
    """The fields, in the order the command line shows them."""
    return fields(EngineConfig)
