"""Errors that the user can act on."""

import errno
from collections.abc import Callable

__all__ = ["InvalidRequest", "OctavoError", "refusal", "shortage"]


class OctavoError(Exception):
    """An error that the user can fix. The message is one sentence: what was wrong, and what to do.

    The command line prints it without a traceback and exits with 1.
    """


class InvalidRequest(OctavoError):
    """A request that cannot be served as it is. The server answers it with HTTP 400.

    `param` names the field at fault, as in OpenAI's error object.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:  # crosses the engine's process border
        return type(self), (str(self), self.param)


def refusal(check: Callable[[], object]) -> str | None:
    """The sentence that `check` raises; None where it passes."""
    try:
        check()
    except OctavoError as error:
        return str(error)
    return None


def shortage(error: BaseException) -> str | None:
    """A sentence for an error of the system or a library that means too little memory, threads or open files; else None."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return f"Too many files are open ({text}); raise the limit (ulimit -n)."
    lacking = any(words in str(error).lower() for words in _SHORT_OF_MEMORY)
    if (
        isinstance(error, MemoryError)
        or number == errno.ENOMEM
        or (lacking and isinstance(error, (RuntimeError, ImportError, OSError)))
    ):
        return (
            f"There is too little memory ({text}); raise the limit (ulimit -v), free some, or use less of it: "
            "a smaller --max-model-len, --cpu-kv-cache-gib or --max-num-batched-tokens."
        )
    return None


# The wording of torch, glibc's loader and Python.
_SHORT_OF_MEMORY = (
    "not enough memory",
    "allocate memory",
    "out of memory",
    "failed to map segment",
    "can't start new thread",
    "std::bad_alloc",
)
