"""Finds the form of message content that a chat template reads from its syntax tree: one string, or a list of parts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TypeGuard

from jinja2 import nodes

from octavo.text.chat_messages import ContentFormat
from octavo.text.chat_template import parse_template

__all__ = ["content_format", "key_read"]


@lru_cache(maxsize=16)
def content_format(template: str) -> ContentFormat:
    """`openai` for a template that loops over content parts, `string` for one that does not, `either` for one that loops but
    first tests whether content is a string.
    """
    tree = parse_template(template)
    reader = _Reader(tree)
    loops = any(reader.is_content(loop.iter) for loop in tree.find_all(nodes.For))
    asks = any(test.name == "string" and reader.is_content(test.node) for test in tree.find_all(nodes.Test))
    return "string" if not loops else "either" if asks else "openai"


def key_read(node: nodes.Node) -> str | None:
    """The attribute or key that the expression reads, by a dot, brackets or `get`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    if _is_get(node) and isinstance(key := node.args[0], nodes.Const) and isinstance(key.value, str):
        return key.value
    return None


def _is_get(node: nodes.Node) -> TypeGuard[nodes.Call]:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and bool(node.args)


class _Reader:
    """Tracks which names in a template refer to the list of messages, to one message, or to a message's content."""

    def __init__(self, tree: nodes.Template):
        self._messages: set[str] = {"messages"}
        self._message: set[str] = set()
        self._content: set[str] = set()
        self._namespaces = {
            name
            for assigned in tree.find_all(nodes.Assign)
            if _called(assigned.node) == "namespace"
            for name in _targets(assigned.target)
        }
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        while self._learn(tree):
            pass

    def is_content(self, node: nodes.Node) -> bool:
        """Whether the expression is a message's content, or a part or filtered form of it."""
        node = _inner(node)
        if (name := self._name(node)) is not None:
            return name in self._content
        if key_read(node) != "content":
            return False
        return self._is_message(node.node.node if _is_get(node) else node.node)  # type: ignore[attr-defined]

    def _is_message(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice) and self._is_messages(node.node):
            return True
        return self._name(_inner(node)) in self._message

    def _is_messages(self, node: nodes.Node) -> bool:
        return self._name(_inner(node)) in self._messages

    def _name(self, node: nodes.Node) -> str | None:
        """The name of a value: a variable, or an attribute of a namespace."""
        if isinstance(node, nodes.Name):
            return node.name
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name in self._namespaces:
            return node.attr
        return None

    def _learn(self, tree: nodes.Template) -> bool:
        """Propagates the names once through the template. Whether new ones were found."""
        known = len(self._messages) + len(self._message) + len(self._content)
        for loop in tree.find_all(nodes.For):
            if self._is_messages(loop.iter):
                self._message |= _targets(loop.target)
        for assigned in tree.find_all(nodes.Assign):
            self._bind(_targets(assigned.target), assigned.node)
        for call in tree.find_all(nodes.Call):
            macro = self._macros.get(_called(call) or "")
            if macro is not None:
                for parameter, given in zip(macro.args, call.args, strict=False):
                    self._bind({parameter.name}, given)
            if macro is not None or _called(call) == "namespace":
                for named in call.kwargs:
                    self._bind({named.key}, named.value)
        return len(self._messages) + len(self._message) + len(self._content) > known

    def _bind(self, names: set[str], value: nodes.Node) -> None:
        for one in _alternatives(value):
            if self.is_content(one):
                self._content |= names
            elif self._is_message(one):
                self._message |= names
            elif self._is_messages(one):
                self._messages |= names


def _alternatives(node: nodes.Node) -> Iterator[nodes.Node]:
    if isinstance(node, nodes.CondExpr):
        yield from _alternatives(node.expr1)
        if node.expr2 is not None:
            yield from _alternatives(node.expr2)
    elif isinstance(node, (nodes.Or, nodes.And)):
        yield from _alternatives(node.left)
        yield from _alternatives(node.right)
    else:
        yield node


def _called(node: nodes.Node) -> str | None:
    """The name of the called function, if the node is a call."""
    return node.node.name if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) else None


def _inner(node: nodes.Node) -> nodes.Node:
    """The node without enclosing filters and slices."""
    while isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        if node.node is None:  # a filter block
            break
        node = node.node
    return node


def _targets(node: nodes.Node) -> set[str]:
    if isinstance(node, nodes.NSRef):
        return {node.attr}
    return {name.name for name in ([node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name))}
