"""What an operator does to a running server, as methods of LLM: sleep, reloading weights, emptying the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.errors import InvalidRequest
from octavo.frontend.keywords import names_keywords
from octavo.frontend.model_files import checkpoint_to_load
from octavo.messages import KV_CACHE, WEIGHTS, EngineInfo

__all__ = ["OfflineOperations"]


class OfflineOperations:
    """No request runs meanwhile, since `generate` returns once all have ended. Each raises OctavoError where the engine refuses
    it, which then is as before."""

    _core: Any
    _directory: str  # whose weights are loaded
    _awake: frozenset[str] = frozenset((WEIGHTS, KV_CACHE))

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine as it is now."""
        found: EngineInfo = self._core.info
        return found

    @names_keywords()
    def sleep(self, level: int = 1) -> None:
        """Frees weights, cache and graphs until `wake_up`, but not compiled kernels. vLLM's two levels free the same here:
        weights are read from disk again.
        """
        if level not in (1, 2):
            raise InvalidRequest(f"level must be 1 or 2, not {level}.", "level")
        if self._awake:
            self._finish_steps()
            self._core.sleep()
            self._awake = frozenset()

    @names_keywords()
    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Loads or makes again what sleeps: "weights", "kv_cache", or both. The cache's size follows from what weights leave,
        so they come first.
        """
        asked = (WEIGHTS, KV_CACHE) if tags is None else tuple(tags)
        if wrong := [tag for tag in asked if tag not in (WEIGHTS, KV_CACHE)]:
            raise InvalidRequest(f"tags must be {WEIGHTS} or {KV_CACHE}, not {wrong[0]!r}.", "tags")
        for part in (WEIGHTS, KV_CACHE):
            if part in asked and part not in self._awake:
                self._core.wake((part,))
                self._awake |= {part}

    @names_keywords()
    def reload_weights(self, weights_path: str | Path | None = None) -> None:
        """Loads the weights of another checkpoint directory of the same model, or those of the present one again, whose files
        may be new. Shapes and schemes stay those of the start, and the prefix cache is dropped.
        """
        directory = self._directory if weights_path is None else checkpoint_to_load(str(weights_path))
        self._finish_steps()
        self._core.reload(directory)
        self._directory = directory

    @names_keywords()
    def reset_prefix_cache(self) -> None:
        """Forgets the prefixes and images of past requests."""
        self._core.reset_prefix_cache()

    def _finish_steps(self) -> None:
        """Takes the steps that were launched before it was known that their requests had ended, as by a stop string."""
        while self._core.has_work():
            self._core.step()
