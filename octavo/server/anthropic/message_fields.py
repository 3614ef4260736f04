"""Every field of Anthropic's and vLLM's /v1/messages: served, refused with a sentence, or harmless to ignore."""

from __future__ import annotations

from octavo.server.request_fields import CHAT, SERVED, Fate, Harmless, Refused, all_served

__all__ = ["BLOCK_FATES", "MESSAGES", "OUTPUT_CONFIG", "THINKING"]

_LABEL = CHAT["metadata"]
_SPEED = CHAT["service_tier"]

MESSAGES: dict[str, Fate] = {
    **all_served(
        """model messages max_tokens system stop_sequences stream temperature top_p top_k tools tool_choice thinking
        output_config chat_template_kwargs"""
    ),
    "container": Refused("container is not served: no code is run here; leave it out."),
    "mcp_servers": Refused("mcp_servers is not served: the tools are your own; leave it out.", ([],)),
    "context_management": Harmless("every turn is kept, and messages that do not fit are refused"),
    "diagnostics": Refused("diagnostics is not served; usage.cache_read_input_tokens says what was found in the cache."),
    "kv_transfer_params": CHAT["kv_transfer_params"],
    "cache_control": Harmless("every prompt's prefix is cached"),
    "inference_geo": Harmless("the model runs where this server does"),
    "metadata": _LABEL,
    "service_tier": _SPEED,
    "speed": _SPEED,
    "user_profile_id": _LABEL,
    "workspace_id": _LABEL,
}
THINKING: dict[str, Fate] = {
    "type": SERVED,
    "display": SERVED,
    "budget_tokens": Harmless("Anthropic's API calls it a target; max_tokens bounds thinking and answer together"),
}
OUTPUT_CONFIG: dict[str, Fate] = {
    "effort": SERVED,
    "format": SERVED,
    "task_budget": Refused("output_config.task_budget is not served; bound the answer with max_tokens."),
}
# What a content block has besides what it says.
BLOCK_FATES: dict[str, Fate] = {
    "cache_control": Harmless("every prompt's prefix is cached"),
    "citations": Harmless("it is about documents, and those are refused"),
    "signature": Harmless("thinking is not signed here; answers have a word in its place, since clients ask for one"),
    "is_error": Harmless("models are shown the result's text, which says so"),
}
