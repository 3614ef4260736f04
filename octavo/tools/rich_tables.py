"""Tables of numbers for a person, as every tool prints them: no number and no label is ever cut."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any

__all__ = ["console", "gb", "table"]

GAP = 2  # columns of a terminal between two of a table
LEAST = 24  # of a column whose text is wrapped


def console(width: int) -> Any:
    """Where tables go; plain, and at least `width` columns wide, where that is no terminal."""
    from rich.console import Console

    found: Any = Console(highlight=False)
    if not found.is_terminal:
        found = Console(highlight=False, width=max(found.width, width))
    found.print = partial(found.print, crop=False)  # the narrowest terminal wraps a line, and loses nothing
    return found


def gb(count: float) -> str:
    """Bytes for a person, in powers of ten: 811.7 GB, 11.5 MB, 68.6 kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str | None = None,
    *,
    words: Container[int] = (0,),
    bold: int | None = None,
) -> Any:
    """A table with a line above it, and one below. Columns `words` hold text, the others numbers; the row `bold` stands out.

    On a terminal that is too narrow, the columns that do not fit come in a table below, beside the first ones of `words`
    again, which are the rows' labels; text in later ones is wrapped.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Group
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    labels = next((i for i in range(len(columns)) if i not in words), len(columns))
    wrapped = [i in words and i >= labels for i in range(len(columns))]
    sizes = [max(cell_len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    sizes = [min(size, LEAST) if wrap else size for size, wrap in zip(sizes, wrapped, strict=True)]

    def made(shown: Sequence[int]) -> Table:
        found = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for i in shown:
            found.add_column(columns[i], justify="left" if i in words else "right", no_wrap=not wrapped[i])
        for i, row in enumerate(rows):
            found.add_row(*(row[j] for j in shown), style="bold" if i == bold else None)
        return found

    class Fitted:
        def __rich_console__(self, out: Any, options: Any) -> Iterator[Any]:
            width = options.max_width if out.is_terminal else sum(sizes) + GAP * len(sizes)
            for shown in _fitting(sizes, labels, width):
                room = max(options.max_width, sum(sizes[i] + GAP for i in shown))
                yield from out.render(made(shown), options.update(max_width=room))

        def __rich_measure__(self, out: Any, options: Any) -> Measurement:
            return Measurement(0, options.max_width)

    # Beside the table, not of it: a title would be wrapped at the width of a narrow one.
    return Group(Text(title, style="bold"), Fitted(), *([Text(note, style="dim")] if note else []), "")


def _fitting(sizes: Sequence[int], labels: int, width: int) -> list[list[int]]:
    """Which columns each table shows: the first `labels`, and as many of the others as fit into `width`, one at least."""
    first = list(range(labels))
    shown = [list(first)]
    for i in range(labels, len(sizes)):
        if len(shown[-1]) > labels and sum(sizes[j] + GAP for j in [*shown[-1], i]) > width:
            shown.append(list(first))
        shown[-1].append(i)
    return shown
