"""Checks a loaded model before the first request: the logits of one short prompt must be finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.models.interface import Model

__all__ = ["check_first_logits"]

LENGTH = 16  # tokens


@torch.inference_mode()
def check_first_logits(model: Model, vocabulary: Vocabulary, hidden_of: Callable[[list[int]], Tensor | None]) -> None:
    """Raises OctavoError where a prompt of tokens from the whole vocabulary has NaN or infinite logits.

    `hidden_of` runs token ids through the layers, and gives None where the last stage has their outputs; every stage raises
    what that one finds. Waits for the device.
    """
    hidden = hidden_of([n * vocabulary.size // LENGTH for n in range(LENGTH)])
    finite = hidden is None or bool(torch.isfinite(vocabulary.whole(model.logits(hidden))).all())
    ranks = vocabulary.tp.everyone
    if not (finite if ranks is None else ranks.least(int(finite))[0]):
        raise OctavoError(
            "the model's first logits are NaN or infinite, though its weights are numbers: config.json is another's "
            "(see rope_theta and rope_scaling), or weights or scales are far too large; download the model again."
        )
