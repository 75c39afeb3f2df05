"""How pqcli's objects show themselves in a notebook: a title, a few facts, and the first rows of a table.

A small piece of HTML that inherits the notebook's colours and fonts, light or dark, and holds no script. Every text is
made visible and escaped here: names come from strangers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from pqcli.readable import elide, visible

MOST_ROWS = 12
"""Rows that are shown; of the others there is a count."""
LONGEST = 72
"""Characters of a cell; a longer one loses its middle, and has the whole text as its tooltip."""

_LINE = "border-bottom:1px solid rgba(128,128,128,.35)"
_CELL = "padding:.1em .7em;text-align:{side};background:none"


def page(
    title: str,
    facts: Iterable[str] = (),
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    n_rows: int = 0,
) -> str:
    """The HTML. A row has as many cells as there are `columns`.

    `n_rows` is how many rows there are, of which `rows` need to give no more than the first `MOST_ROWS`.
    """
    shown = list(islice(rows, MOST_ROWS))
    parts = [f"<div><b>{_text(title)}</b>", *(f"<br>{_text(fact)}" for fact in facts)]
    if shown:
        head = "".join(_cell(column, i, "th", _LINE) for i, column in enumerate(columns))
        body = "".join(f"<tr>{''.join(_cell(cell, i, 'td') for i, cell in enumerate(row))}</tr>" for row in shown)
        parts.append(
            '<table style="border-collapse:collapse;margin:.4em 0;font-variant-numeric:tabular-nums">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    more = n_rows - len(shown)
    if more > 0:
        parts.append(f"<i>{more:,} more</i>")
    return "".join(parts) + "</div>"


def _cell(text: str, index: int, tag: str, style: str = "") -> str:
    style = ";".join(filter(None, [_CELL.format(side="right" if index else "left"), style]))
    short = elide(visible(text), LONGEST)
    whole = "" if short == visible(text) else f' title="{escape(visible(text))}"'
    return f'<{tag} style="{style}"{whole}>{escape(short)}</{tag}>'


def _text(text: str) -> str:
    return escape(visible(text))
