"""Every field of OpenAI's and vLLM's requests: served, refused with a sentence, or harmless to ignore.

The models in `protocol.py` have the served fields. The others are listed here, so that no known field is ignored without a
reason. Unknown fields are ignored, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import InvalidRequest

__all__ = [
    "CHAT",
    "CHAT_TEMPLATE",
    "COMPLETION",
    "SERVED",
    "STRUCTURED_OUTPUTS",
    "Fate",
    "Harmless",
    "Refused",
    "Served",
    "all_served",
    "refuse_fields",
]


@dataclass(frozen=True, slots=True)
class Served:
    """A field that the request's model has."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A field answered with 400 and `sentence`, except for the values in `unless`, which request nothing."""

    sentence: str
    unless: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Harmless:
    """A field accepted without effect, because it changes nothing in an answer: `why`."""

    why: str


Fate = Served | Refused | Harmless
SERVED = Served()


def all_served(names: str) -> dict[str, Fate]:
    """A table of these fields, which are served."""
    return dict.fromkeys(names.split(), SERVED)


_RENDERING = Harmless("vLLM, too, looks at it only where prompts are rendered and nothing is generated")
_MEDIA_AS_STORED = "is not served: images are prepared as the checkpoint's preprocessor_config.json says; leave it out."
_BOOKKEEPING = Harmless("a client's own label, which no answer depends on")
_SPEED = Harmless("it may make an answer quicker, never another")

_BOTH: dict[str, Fate] = {
    **all_served(
        """model n temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed max_tokens
        min_tokens stop stop_token_ids include_stop_str_in_output ignore_eos logprobs prompt_logprobs logit_bias bad_words
        allowed_token_ids skip_special_tokens stream stream_options add_special_tokens response_format structured_outputs
        guided_json guided_regex guided_choice guided_grammar cache_salt request_id return_token_ids
        return_tokens_as_token_ids"""
    ),
    "best_of": Refused("best_of is not served; ask for n choices and keep the best yourself."),  # allowed if equal to n
    "use_beam_search": Refused("Beam search is not served; leave use_beam_search out.", (False,)),
    "truncate_prompt_tokens": Refused("truncate_prompt_tokens is not served; send a prompt that fits."),
    "truncation_side": Harmless("it says how truncate_prompt_tokens truncates, and that is refused"),
    "logprob_token_ids": Refused("logprob_token_ids is not served; ask for logprobs of the likeliest tokens."),
    "logits_processors": Refused("logits_processors are programs, and no request's program is run; leave them out.", ([],)),
    "priority": Refused("priority is not served: requests run in the order of their arrival; leave it out or send 0.", (0,)),
    "thinking_token_budget": Refused("thinking_token_budget is not served; bound the answer with max_tokens.", (-1,)),
    "repetition_detection": Refused("repetition_detection is not served; use repetition_penalty."),
    "watermarking": Refused("watermarking is not served; leave it out.", (False,)),
    "vllm_xargs": Refused("vllm_xargs are for extensions of vLLM, and there are none here; leave them out.", ({},)),
    "kv_transfer_params": Refused("kv_transfer_params is not served: prefill and decode run in one engine.", ({},)),
    "ec_transfer_params": Refused("ec_transfer_params is not served: images are encoded in the engine that reads them.", ({},)),
    "stream_interval": Refused("stream_interval is not served: every token is a chunk of its own.", (1,)),
    "structural_tag": Refused("structural_tag is not served; use structured_outputs.json or .grammar."),
    "guided_whitespace_pattern": Refused("guided_whitespace_pattern is not served; JSON's white space is bounded already."),
    "guided_decoding_backend": Harmless("there is one engine of grammars, and it reads all the guided_* fields"),
    "length_penalty": Harmless("it is of beam search, which is refused"),
    "spaces_between_special_tokens": Harmless("as with vLLM's fast tokenizers, special tokens stand as they are"),
    "routed_experts_prompt_start": Harmless("it cuts the routed experts that an answer tells, and no answer tells them"),
    "return_token_offsets": _RENDERING,
    "return_mm_kwargs": _RENDERING,
    "session_id": _BOOKKEEPING,
    "user": _BOOKKEEPING,
}
COMPLETION: dict[str, Fate] = {
    **_BOTH,
    "prompt": SERVED,
    "echo": SERVED,
    "suffix": Refused("suffix is not served; put both sides of the gap into the prompt as the model expects them.", ("",)),
    "prompt_embeds": Refused("prompt_embeds is not served; send text or token ids as the prompt.", ([],)),
}
CHAT_TEMPLATE = Refused(  # a template is a program, and an endless loop in it would stop the server
    "A request cannot bring a chat_template; start the server with --chat-template.", ("",)
)
_AUDIO = "Only text is answered; leave {} out."
CHAT: dict[str, Fate] = {
    **_BOTH,
    **all_served(
        """messages tools tool_choice parallel_tool_calls top_logprobs max_completion_tokens add_generation_prompt
        continue_final_message chat_template_kwargs documents reasoning_effort include_reasoning return_prompt_text"""
    ),
    "echo": Refused("echo is not served in a chat; the last message is known to who sent it.", (False,)),
    "chat_template": CHAT_TEMPLATE,
    "functions": Refused("functions were replaced by tools, and only those are served.", ([],)),
    "function_call": Refused("function_call was replaced by tool_choice, and only that is served.", ("none",)),
    "modalities": Refused(_AUDIO.format("other modalities"), (["text"], [])),
    "audio": Refused(_AUDIO.format("audio")),
    "web_search_options": Refused("Nothing is searched on the web; leave web_search_options out."),
    "moderation": Refused("Answers are not moderated; leave moderation out."),
    "verbosity": Refused("verbosity is not served; say in a message how long the answer should be.", ("medium",)),
    "media_io_kwargs": Refused(f"media_io_kwargs {_MEDIA_AS_STORED}", ({},)),
    "mm_processor_kwargs": Refused(f"mm_processor_kwargs {_MEDIA_AS_STORED}", ({},)),
    "metadata": _BOOKKEEPING,
    "safety_identifier": _BOOKKEEPING,
    "store": Harmless("nothing is stored, and an answer is the same stored or not"),
    "service_tier": _SPEED,
    "prediction": _SPEED,
    "prompt_cache_key": _SPEED,
    "prompt_cache_options": _SPEED,
    "prompt_cache_retention": _SPEED,
}
STRUCTURED_OUTPUTS: dict[str, Fate] = {
    **all_served("json json_object regex choice grammar"),
    "structural_tag": Refused("structural_tag is not served; use structured_outputs.json or .grammar."),
    "whitespace_pattern": Refused("whitespace_pattern is not served; JSON's white space is bounded already."),
    "disable_any_whitespace": Refused("disable_any_whitespace is not served; JSON's white space is bounded already.", (False,)),
    "disable_additional_properties": Harmless("objects with properties are closed unless the schema says otherwise"),
    "disable_fallback": Harmless("there is one engine of grammars and nothing to fall back on"),
}


def refuse_fields(table: Mapping[str, Fate], data: Mapping[str, Any], where: str = "") -> None:
    """Raises InvalidRequest for the first refused field of `data`. null requests nothing."""
    for name, value in data.items():
        fate = table.get(name)
        if not isinstance(fate, Refused) or value is None or _is_n(name, value, data):
            continue
        if not any(type(value) is type(idle) and value == idle for idle in fate.unless):
            raise InvalidRequest(fate.sentence, where + name)


def _is_n(name: str, value: Any, data: Mapping[str, Any]) -> bool:
    """Whether the field is a best_of that keeps all n choices."""
    return name == "best_of" and type(value) is int and value == (data.get("n") or 1)
