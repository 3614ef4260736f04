"""Renders chat templates as transformers does: messages in, prompt text out.

A template is a program from a checkpoint, so it runs in jinja2's immutable sandbox, where it can read its inputs and nothing
else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidRequest, OctavoError

if TYPE_CHECKING:
    from jinja2 import Environment, nodes

__all__ = ["check_template", "parse_template", "render_chat"]

_LONGEST_ERROR = 1000  # characters of an error that are repeated, because a template may put a whole message into it


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> str:
    """The prompt's text. `kwargs` are the template's switches, such as enable_thinking.

    Raises InvalidRequest if the template refuses the messages, OctavoError if it is not a valid template.
    """
    render = _compile(template)
    values = {**special_tokens, "documents": None, **kwargs}
    values |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    try:
        return render(values)
    except InvalidRequest:
        raise
    except Exception as error:  # anything that unexpected messages may cause in a template: TypeError, KeyError, ...
        text = str(error)[:_LONGEST_ERROR] or type(error).__name__
        raise InvalidRequest(f"The chat template cannot render these messages: {text}", "messages") from error


def check_template(template: str) -> None:
    """Raises OctavoError for an invalid template."""
    _compile(template)


@lru_cache(maxsize=16)
def _compile(template: str) -> Callable[[Mapping[str, Any]], str]:
    import jinja2

    try:
        return _environment().from_string(template).render
    except jinja2.TemplateSyntaxError as error:
        raise _no_template(error.lineno, error.message) from error
    except RecursionError as error:
        raise OctavoError("The chat template is not valid jinja (it is nested too deeply).") from error
    except (SyntaxError, ValueError, OverflowError, MemoryError) as error:  # from the Python code that jinja generates
        raise OctavoError(f"The chat template cannot be compiled ({str(error) or type(error).__name__}).") from error


def parse_template(template: str) -> nodes.Template:
    """The syntax tree. Raises OctavoError as render_chat does."""
    import jinja2

    try:
        return _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise _no_template(error.lineno, error.message) from error
    except RecursionError as error:
        raise OctavoError("The chat template is not valid jinja (it is nested too deeply).") from error


def _no_template(line: int, message: str | None) -> OctavoError:
    return OctavoError(f"The chat template is not valid jinja (line {line}: {message}).")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    import jinja2
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.utils
    from jinja2.compiler import CodeGenerator
    from jinja2.nodes import CallBlock, Expr, Impossible, Node, TemplateData
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's output for training. For serving it renders its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's convention)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args  # a template may name an attribute `self`
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*rest, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name}")
            super().__setitem__(name, value)

    class WithoutFolding(CodeGenerator):
        """Disables constant folding: constants such as 9**9**9 would be computed at compile time, where no limit applies."""

        def _output_child_to_const(self, node: Expr, *_: Any) -> str:
            if not isinstance(node, TemplateData):
                raise Impossible
            return node.data

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = WithoutFolding
        intercepted_binops = frozenset(("**", "*", "%"))  # otherwise Python would fold them in constant expressions

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # The sandbox guards reads of underscored attributes. These two could still write them or return a class.
    env.globals["namespace"] = Namespace
    env.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's filter escapes <, > and & for HTML, but models were trained on the plain characters
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise InvalidRequest(str(message)[:_LONGEST_ERROR], "messages")
