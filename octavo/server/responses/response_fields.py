"""Every field of OpenAI's and vLLM's /v1/responses: served, refused with a sentence, or harmless to ignore."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.server.request_fields import CHAT, SERVED, Fate, Harmless, Refused, all_served

__all__ = ["INCLUDE", "REASONING", "RESPONSES", "TEXT"]

_OWN_TOOLS = Harmless("those tools are refused, so no answer has their calls")

RESPONSES: dict[str, Fate] = {
    **all_served(
        """model input instructions tools tool_choice parallel_tool_calls text reasoning max_output_tokens temperature top_p
        top_logprobs include stream store previous_response_id metadata
        top_k logit_bias skip_special_tokens include_stop_str_in_output cache_salt chat_template_kwargs structured_outputs
        repetition_penalty seed stop ignore_eos"""
    ),
    "background": Refused("background is not served; leave it out and read the answer, or its stream, to the end.", (False,)),
    "background_options": Refused("background is not served; leave background_options out.", ({},)),
    "conversation": Refused("conversation is not served; send the earlier items as input, or a previous_response_id."),
    "context_management": Refused("context_management is not served; send an input that fits.", ([],)),
    "truncation": Refused("truncation is not served; send an input that fits, or leave it 'disabled'.", ("disabled",)),
    "prompt": Refused("prompt is not served: no prompt templates are kept here; send their text as input."),
    "access_programs": Refused("access_programs are OpenAI's own; leave them out.", ({},)),
    "image": Refused(
        "image is not served: images are read as they are sent; leave it out.", ({}, {"context_compression": "auto"})
    ),
    "moderation": CHAT["moderation"],
    "media_io_kwargs": CHAT["media_io_kwargs"],
    "mm_processor_kwargs": CHAT["mm_processor_kwargs"],
    "priority": CHAT["priority"],
    "kv_transfer_params": CHAT["kv_transfer_params"],
    "vllm_xargs": CHAT["vllm_xargs"],
    "previous_input_messages": Refused("previous_input_messages is not served; send the earlier items as input.", ([],)),
    "enable_response_messages": Refused("enable_response_messages is not served: an answer has items alone.", (False,)),
    "max_tool_calls": Harmless("it counts calls of OpenAI's own tools, which are refused"),
    "stream_options": Harmless("it turns obfuscation off, and nothing is obfuscated"),
    "request_id": Harmless("an answer's id is what it is kept under, so it is made here; X-Request-Id is returned"),
    "service_tier": CHAT["service_tier"],
    "prompt_cache_key": CHAT["prompt_cache_key"],
    "prompt_cache_options": CHAT["prompt_cache_options"],
    "prompt_cache_retention": CHAT["prompt_cache_retention"],
    "safety_identifier": CHAT["safety_identifier"],
    "user": CHAT["user"],
}
TEXT: dict[str, Fate] = {"format": SERVED, "verbosity": CHAT["verbosity"]}
_WHOLE = Harmless("reasoning is told whole, and never summed up")
REASONING: dict[str, Fate] = {
    "effort": SERVED,
    "summary": _WHOLE,
    "generate_summary": _WHOLE,
    "context": Harmless("the chat template decides which earlier reasoning the model sees"),
    "mode": Refused("reasoning.mode is not served; ask for more by reasoning.effort.", ("standard",)),
}
INCLUDE: Mapping[str, Fate] = {
    "message.output_text.logprobs": SERVED,
    "reasoning.encrypted_content": Harmless("reasoning is told in the clear, as its item's content"),
    "file_search_call.results": _OWN_TOOLS,
    "web_search_call.results": _OWN_TOOLS,
    "web_search_call.action.sources": _OWN_TOOLS,
    "computer_call_output.output.image_url": _OWN_TOOLS,
    "code_interpreter_call.outputs": _OWN_TOOLS,
    "message.input_image.image_url": Refused("message.input_image.image_url is not served: an answer repeats no input."),
}
