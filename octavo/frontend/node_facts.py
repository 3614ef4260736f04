"""What hosts of one engine must have in common: versions, flags, the checkpoint's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig, config_fields, flag_of
from octavo.version import __version__

__all__ = ["are_facts", "difference", "facts"]

# What may differ: paths, the memory and threads of a host, what only host 0 uses.
OWN = (
    "model", "revision", "download_dir", "tokenizer", "generation_config", "override_generation_config", "quantization_config",
    "gpu_memory_utilization", "cpu_kv_cache_gib", "kv_cache_memory_bytes", "threads", "node_rank", "master_addr", "master_port",
    "distributed_timeout_seconds", "trust_remote_code", "allowed_local_media_path", "allowed_media_domains", "max_logprobs",
)  # fmt: skip
HASHED = ("config.json", "model.safetensors.index.json")


def facts(config: EngineConfig) -> dict[str, Any]:
    """Those of this host, as JSON can hold them. config: whose model is a directory that exists."""
    directory = Path(config.model)
    files = {name: _digest(directory / name) for name in HASHED if (directory / name).exists()}
    if config.load_format != "dummy":
        files |= {path.name: str(path.stat().st_size) for path in sorted(directory.glob("*.safetensors"))}
    flags = {flag_of(field.name): getattr(config, field.name) for field in config_fields() if field.name not in OWN}
    found = {"octavo": __version__, "torch": metadata.version("torch"), "flags": flags, "files": files}
    return dict(json.loads(json.dumps(found, default=str))) | {"model": config.model}


def are_facts(given: Any) -> bool:
    """Whether this may be another host's: what `difference` can read, of whichever version."""
    return isinstance(given, dict) and all(isinstance(given.get(name), dict) for name in ("flags", "files"))


def difference(who: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """A sentence that says how `who` differs from host 0, if it does. `theirs` may be another version's."""
    for name, title in (("octavo", "Octavo"), ("torch", "torch")):
        if theirs.get(name) != own[name]:
            versions = f"{title} {theirs.get(name)}, and node 0 has {own[name]}"
            return f"{who} has {versions}; install one version on all nodes."
    for flag, value in own["flags"].items():
        if (other := theirs["flags"].get(flag)) != value:
            flags = f"{_given(flag, other)}, and node 0 with {_given(flag, value)}"
            return f"{who} was started with {flags}; give all nodes the same."
    for name in sorted({**own["files"], **theirs["files"]}):
        if theirs["files"].get(name) != own["files"].get(name):
            lacks = name not in theirs["files"]
            how = f"lacks {name}, which is" if lacks else f"has another {name} than is" if name in own["files"] else None
            what = f"{how} on node 0" if how else f"has {name}, which is not on node 0"
            return f"{who} {what} ({theirs.get('model')} there, {own['model']} here); copy one checkpoint to all nodes."
    return None


def _given(flag: str, value: Any) -> str:
    return f"no {flag}" if value in (None, False, [], {}) else flag if value is True else f"{flag} {str(value)[:80]}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
