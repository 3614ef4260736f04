"""The prompt format of DeepSeek-V3.2, whose checkpoint has no chat template but a script that encodes messages.

This template produces that script's output (https://huggingface.co/deepseek-ai/DeepSeek-V3.2, encoding/encoding_dsv32.py, MIT).
Its text about tools is the script's, with which the model was trained; it follows the first system message. `thinking` or
`enable_thinking` lets the model think. The prompt includes earlier thinking only from after the user's last message.

The template is more lenient than the script: there may be fewer results than calls, arguments that are no JSON are written
unchanged, and an assistant's message after the user's last may lack thinking. It omits the developer role, which the script
has for search agents only, and response_format, which a grammar enforces.
"""

from __future__ import annotations

__all__ = ["DEEPSEEK_V32"]

DEEPSEEK_V32 = r"""
{%- macro tools_section() -%}
{{ '\n\n' }}## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{% for tool in tools %}
{{ tool.function | tojson }}
{% endfor %}
</functions>{{ '\n' }}
{%- endmacro -%}
{%- macro call_of(function) -%}
<｜DSML｜invoke name="{{ function.name }}">{{ '\n' }}
{%- if function.arguments is mapping -%}
{%- for key, value in function.arguments.items() -%}
<｜DSML｜parameter name="{{ key }}" string="{{ 'true' if value is string else 'false' }}">
{{- value if value is string else value | tojson -}}
</｜DSML｜parameter>{{ '\n' if not loop.last }}
{%- endfor -%}
{%- else -%}
{{ function.arguments }}
{%- endif -%}
{{ '\n' }}</｜DSML｜invoke>{{ '\n' }}
{%- endmacro -%}
{%- set thinks = (thinking is defined and thinking) or (enable_thinking is defined and enable_thinking) -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
<｜begin▁of▁sentence｜>
{%- if tools and messages[0].role != 'system' -%}{{ tools_section() }}{%- endif -%}
{%- for message in messages -%}
{%- set answered = add_generation_prompt or not loop.last -%}
{%- if message.role == 'system' -%}
{{ message.content }}{{ tools_section() if tools and loop.first }}
{%- elif message.role == 'user' -%}
<｜User｜>{{ message.content }}
{%- if answered -%}
<｜Assistant｜>{{ '<think>' if thinks and loop.index0 == ns.last_user else '</think>' }}
{%- endif -%}
{%- elif message.role == 'assistant' -%}
{%- if thinks and loop.index0 > ns.last_user -%}
{{ message.reasoning_content or message.reasoning }}</think>
{%- endif -%}
{{ message.content }}
{%- if message.tool_calls -%}
{{ '\n\n' }}<｜DSML｜function_calls>{{ '\n' }}
{%- for call in message.tool_calls -%}{{ call_of(call.function) }}{%- endfor -%}
</｜DSML｜function_calls>
{%- endif -%}
<｜end▁of▁sentence｜>
{%- elif message.role == 'tool' -%}
{%- if loop.first or not (loop.previtem.tool_calls or loop.previtem.role == 'tool') -%}
{{ raise_exception('A tool message must follow an assistant message with tool_calls.') }}
{%- endif -%}
{{ '\n\n<function_results>' if loop.previtem.role != 'tool' }}{{ '\n' }}<result>{{ message.content }}</result>
{%- if loop.last or loop.nextitem.role != 'tool' -%}
{{ '\n' }}</function_results>
{%- if answered -%}
{{ '\n\n' }}{{ '<think>' if thinks and loop.index0 >= ns.last_user else '</think>' }}
{%- endif -%}
{%- endif -%}
{%- else -%}
{{ raise_exception('DeepSeek-V3.2 knows messages of the roles system, user, assistant and tool, not ' ~ message.role ~ '.') }}
{%- endif -%}
{%- endfor -%}
"""  # noqa: E501
