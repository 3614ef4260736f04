"""The text that calibration makes a model read, as windows of token ids."""

from __future__ import annotations

from pathlib import Path

from octavo.convert.calibration import WINDOW
from octavo.errors import OctavoError
from octavo.models import architecture, read_config
from octavo.text.tokenizer import Tokenizer

__all__ = ["DEFAULT", "TOKENS", "calibration_windows"]

# Pieces of the topics of Python 3.11's help() and of its standard library, by the PSF licence (demo/model/LICENSE-PSF.txt); of
# none of the modules that are the demo model's held-out text.
DEFAULT = Path(__file__).parent / "calibration.txt"
TOKENS = 32768


def calibration_windows(model: Path, text: str, tokens: int) -> list[list[int]]:
    """Windows from all over a text, `tokens` in all or as many as it has: of the file `text`, or of Octavo's own, "default".

    Raises OctavoError for a text that cannot be read, and for fewer tokens than a window has.
    """
    if tokens < WINDOW:
        raise OctavoError(f"--calibration-tokens {tokens} is less than one window of {WINDOW}; use at least that.")
    path = DEFAULT if text == "default" else Path(text)
    if path.is_dir():
        raise OctavoError(
            f"--calibrate {path} is a directory, not a text; where it is the model, it stands before --calibrate, which takes "
            "the word behind it."
        )
    try:
        written = path.read_text("utf-8")
    except OSError as error:
        raise OctavoError(f"--calibrate {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise OctavoError(f"--calibrate {path} is not UTF-8 text.") from None
    config = read_config(model)
    longest: int = architecture(config).Config.from_json(config).longest_context
    window = min(WINDOW, longest)
    ids = Tokenizer(model).encode(written)
    room = len(ids) // window
    if not room:
        raise OctavoError(f"--calibrate {path} has {len(ids)} tokens, fewer than one window of {window}; give a longer text.")
    count = min(room, tokens // window)
    starts = [i * room // count * window for i in range(count)]
    return [ids[at : at + window] for at in starts]
