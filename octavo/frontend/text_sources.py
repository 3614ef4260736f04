"""Where the flags say that a model's tokenizer and default sampling are."""

from __future__ import annotations

from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.text.checkpoint_text import no_tokenizer
from octavo.text.generation_config import Generation

__all__ = ["check_named", "check_text", "generation_of"]


def generation_of(config: EngineConfig) -> Generation:
    """What --generation-config and --override-generation-config say."""
    named = config.generation_config
    own = named in ("auto", "vllm")
    settings = Path(config.model if own else named)
    overrides = config.override_generation_config or {}
    assert not isinstance(overrides, str)
    return Generation(Path(config.model), settings, named != "vllm", overrides)


def check_text(config: EngineConfig) -> None:
    """Raises OctavoError, before the model is loaded, for what these flags or the model's own files say wrong."""
    check_named(config)
    generation_of(config).sampling()


def check_named(config: EngineConfig) -> None:
    """Raises OctavoError, before a model is downloaded, for directories that have not what these flags give them for."""
    generation = generation_of(config)
    if config.generation_config not in ("auto", "vllm") and not (generation.settings / "generation_config.json").exists():
        raise OctavoError(
            f"--generation-config {config.generation_config} has no generation_config.json; give a directory with one, "
            "auto for the model's, or vllm for none."
        )
    if config.tokenizer is not None and no_tokenizer(config.tokenizer):
        raise OctavoError(f"--tokenizer {config.tokenizer} has no tokenizer.json; give a directory with one, or leave it out.")
