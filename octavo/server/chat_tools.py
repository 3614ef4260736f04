"""The tools of a chat request: which calls the model may or must make, and who reads them from its text."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import InvalidRequest
from octavo.messages import StructuredOutput
from octavo.server.parsers.argument_types import ArgumentTypes
from octavo.server.parsers.call import CallParser, NamedCall
from octavo.server.parsers.registry import call_form, keeps_special, make_parser
from octavo.server.protocol import ChatRequest, NamedToolChoice
from octavo.server.serving import Served
from octavo.server.structured import arguments_of, calls_of

__all__ = ["ChatTools"]


class ChatTools:
    """What the request's tools and tool_choice mean for the grammar and for parsing the answer."""

    def __init__(self, served: Served, request: ChatRequest):
        names = [tool.function.name for tool in request.tools or ()]
        self.types = ArgumentTypes({tool.function.name: tool.function.parameters for tool in request.tools or ()})
        choice = request.tool_choice if request.tool_choice is not None else ("auto" if names else "none")
        if not names and choice not in ("none", "auto"):
            raise InvalidRequest("tool_choice needs tools to choose from.", "tool_choice")
        self.named = choice.function.name if isinstance(choice, NamedToolChoice) else None
        if self.named is not None and self.named not in names:
            raise InvalidRequest(f"tool_choice names '{self.named}', which is not among the tools.", "tool_choice")
        self.parser: str | None = None
        self.structured: StructuredOutput | None = None
        if self.named is not None:
            function = next(tool.function for tool in request.tools or () if tool.function.name == self.named)
            self.structured = arguments_of(function)
        elif choice == "required":
            self.parser = "json"
            self.structured = calls_of(request.tools or (), not request.parallel_tool_calls)
        elif choice == "auto" and names:
            self.parser = served.tool_parser
        self.form = replace(call_form(self.parser or served.tool_parser), named=self.named)
        self.keep_special = self.parser is not None and keeps_special(self.parser)

    def reader(self) -> CallParser | None:
        """The parser of calls for one choice, if it may contain any."""
        if self.named is not None:
            return NamedCall(self.named)
        return make_parser(self.parser, self.types) if self.parser else None
