"""Errors that a person can act on."""

from collections.abc import Callable

__all__ = ["InvalidRequest", "OctavoError", "refusal"]


class OctavoError(Exception):
    """Something the user can mend. The message is one sentence: what was wrong, and what to do.

    The command line prints it without a traceback and exits with 1.
    """


class InvalidRequest(OctavoError):
    """A request that cannot be served as it is; the server answers it with HTTP 400.

    `param` names the field at fault, as OpenAI's error shape has it.
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
