"""What a checkpoint brings for text, looked at before anything is loaded: chat templates, and whether it has a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.files import read_text
from octavo.text.chat_template import check_template
from octavo.text.deepseek_encoding import DEEPSEEK_V32
from octavo.text.generation_config import read_json
from octavo.text.tiktoken_model import is_kimis

__all__ = ["chat_templates", "check_templates", "no_tokenizer", "stand_in_note"]

_STAND_INS = {"deepseek_v32": DEEPSEEK_V32}  # of families whose checkpoints have no chat template


def check_templates(directory: str | Path, given: str | None = None) -> None:
    """Raises OctavoError for a chat template that is not valid jinja: the one `given` in place of the checkpoint's, or each of
    the checkpoint's.
    """
    if given is not None:
        _check("--chat-template", given)
        return
    folder = Path(directory)
    for name, template in chat_templates(folder, read_json(folder / "tokenizer_config.json")).items():
        _check(f"{directory}, chat template '{name}'", template)


def _check(where: str, template: str) -> None:
    try:
        check_template(template)
    except OctavoError as error:
        raise OctavoError(f"{where}: {str(error).removesuffix('.')}; mend it, or give another with --chat-template.") from error


def no_tokenizer(directory: str | Path) -> str | None:
    """What a checkpoint without a tokenizer can do, in a sentence; None for one that has it."""
    folder = Path(directory)
    if (folder / "tokenizer.json").exists() or is_kimis(folder):
        return None
    old = next((name for name in ("tokenizer.model", "vocab.json", "tiktoken.model") if (folder / name).exists()), None)
    mend = f"make one of its {old} with transformers (AutoTokenizer, save_pretrained)" if old else "add the model's"
    return (
        f"{directory} has no tokenizer.json, so only prompts of token ids are served (to /v1/completions, where "
        f"return_token_ids asks for ids in the answer), no text and no chat; {mend} for those."
    )


def chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. A file of its own wins over the text inside tokenizer_config.json, as in transformers. Where there is
    none, Octavo has its own for some families.
    """
    inline = read_json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list) and all(map(_is_named_template, inline)):
        templates.update((entry["name"], entry["template"]) for entry in inline)
    elif inline is not None:
        raise OctavoError(
            f"{directory}: chat_template must be a text or a list of objects with a name and a template, "
            f"not {str(inline)[:80]}; mend tokenizer_config.json or chat_template.json."
        )
    more = directory / "additional_chat_templates"
    for path in [*sorted(more.glob("*.jinja")), directory / "chat_template.jinja"]:
        if (text := read_text(path)) is not None:
            templates["default" if path.parent == directory else path.stem] = text
    if not templates and (own := _STAND_INS.get(str(read_json(directory / "config.json").get("model_type")))):
        templates["default"] = own
    return templates


def stand_in_note(template: str | None) -> str | None:
    """What to say of a template that is Octavo's own."""
    family = next((family for family, own in _STAND_INS.items() if own == template), None)
    return family and f"the checkpoint has no chat template: messages are written in the form that was published for {family}."


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
