"""Tables of numbers for all tools' terminal output. Numbers and labels are never truncated."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any

__all__ = ["console", "gb", "table"]

GAP = 2  # terminal columns between two table columns
LEAST = 24  # minimum width of a wrapped text column


def console(width: int) -> Any:
    """The console for tables. Outside of a terminal it prints plain text and is at least `width` columns wide."""
    from rich.console import Console

    found: Any = Console(highlight=False)
    if not found.is_terminal:
        found = Console(highlight=False, width=max(found.width, width))
    found.print = partial(found.print, crop=False)  # a narrow terminal wraps lines instead of cropping them
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
    """A table with a title above it and a note below. Columns `words` hold text, the others numbers. Row `bold` is bold.

    On a narrow terminal, columns that do not fit are printed in further tables, with the leading columns of `words`, which are
    the row labels, repeated. Text in later columns is wrapped.
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

    # The title is printed beside the table, because as part of a narrow one it would be wrapped.
    return Group(Text(title, style="bold"), Fitted(), *([Text(note, style="dim")] if note else []), "")


def _fitting(sizes: Sequence[int], labels: int, width: int) -> list[list[int]]:
    """The columns of each table: the first `labels`, and as many others as fit into `width`, at least one."""
    first = list(range(labels))
    shown = [list(first)]
    for i in range(labels, len(sizes)):
        if len(shown[-1]) > labels and sum(sizes[j] + GAP for j in [*shown[-1], i]) > width:
            shown.append(list(first))
        shown[-1].append(i)
    return shown
