"""Tables of numbers for a person, as every tool prints them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

__all__ = ["console", "table"]


def console(width: int) -> Any:
    """Where tables go; plain, and at least `width` columns wide, where that is no terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, width))


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str | None = None,
    *,
    words: Container[int] = (0,),
    bold: int | None = None,
) -> Any:
    """A table with a line above it, and one below. Columns `words` hold text, the others numbers; the row `bold` stands out."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i in words else "right", no_wrap=i not in words)
    for i, row in enumerate(rows):
        made.add_row(*row, style="bold" if i == bold else None)
    # Beside the table, not of it: a title would be wrapped at the width of a narrow one.
    return Group(Text(title, style="bold"), made, *([Text(note, style="dim")] if note else []), "")
