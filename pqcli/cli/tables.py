"""Tables as lines of text: a report, a plan, the records of a container.

Laid out here rather than by rich, for three rules: a row is one line, a name that is too long loses its middle, and a
terminal that is too narrow loses the least important columns. Without a width nothing is lost, so that `grep` and
`less -S` see all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from pqcli.cli import readable
from pqcli.cli.readable import elide, visible
from pqcli.reports.figures import Report

if TYPE_CHECKING:
    from pqcli.jobs.compare import Comparison
    from pqcli.jobs.preview import Preview
    from pqcli.jobs.statistics import Seen
    from pqcli.plan.plan import PlanEntry

N_NOTES = 4
"""Reasons and aliases that the lines below a table name."""
N_NAMED = 3
"""Dropped entries that are named of those with one reason."""


@dataclass(frozen=True)
class Column:
    """A column: its title, the cells of rows and totals, and how long it is kept when the terminal gets narrow.

    Rank 0 is always shown; among the others the highest rank goes first. `least` is the width down to which cells are
    elided before any column goes; None for a column whose cells are shown whole.
    """

    title: str
    cells: Sequence[str]
    totals: Sequence[str] = ()
    rank: int = 0
    left: bool = False
    least: int | None = None

    @property
    def natural(self) -> int:
        """The width that shows every cell whole, within reason."""
        return min(MOST_CELLS, max(cell_len(text) for text in (self.title, *self.cells, *self.totals)))

    @property
    def minimum(self) -> int:
        """The width this column needs to be shown at all."""
        return self.natural if self.least is None else min(self.natural, self.least)


GAP = 2
"""Blank cells between columns."""
FEWEST_CELLS = 12
"""What an elided column is given when nothing else can go."""
MOST_CELLS = 200
"""A longer cell is elided even where the width is not limited: one monstrous name must not pad every row."""


def lay_out(
    columns: Sequence[Column], styles: Sequence[str], width: int | None, *, ascii_only: bool = False
) -> list[Text]:
    """The lines of a table: titles, a rule, a line a row in its style, a rule, and the totals.

    No line is wider than `width`, unless the columns of rank 0 alone are; None shows everything.
    """
    if not columns:
        return []
    shown = list(columns)
    while width is not None and sum(column.minimum + GAP for column in shown) - GAP > width:
        droppable = [column for column in shown if column.rank]
        if not droppable:
            break
        shown.remove(max(droppable, key=lambda column: column.rank))
    widths = _widths(shown, width)
    ellipsis = "..." if ascii_only else "…"

    def line(texts: Sequence[str], style: str) -> Text:
        cells = (
            _padded(elide(text, cells, ellipsis), cells, left=column.left)
            for text, column, cells in zip(texts, shown, widths, strict=True)
        )
        return Text((" " * GAP).join(cells).rstrip(), style=style, no_wrap=True)

    rule = Text(("-" if ascii_only else "─") * (sum(widths) + GAP * (len(widths) - 1)), style="dim", no_wrap=True)
    rows = [
        line(texts, style)
        for texts, style in zip(zip(*(column.cells for column in shown), strict=True), styles, strict=True)
    ]
    totals = [line(texts, "bold") for texts in zip(*(column.totals for column in shown), strict=True)]
    return [line([column.title for column in shown], "bold"), rule, *rows, *([rule, *totals] if totals else [])]


def _widths(columns: Sequence[Column], width: int | None) -> list[int]:
    """Natural widths where they fit; else the last columns that may be elided give way first."""
    widths = [column.natural for column in columns]
    if width is None:
        return widths
    excess = sum(widths) + GAP * (len(widths) - 1) - width
    for least in (None, FEWEST_CELLS):
        for index in reversed(range(len(columns))):
            spare = widths[index] - (columns[index].minimum if least is None else least)
            if columns[index].least is not None and excess > 0 and spare > 0:
                widths[index] -= min(excess, spare)
                excess -= min(excess, spare)
    return widths


def _padded(text: str, width: int, *, left: bool) -> str:
    blank = " " * max(0, width - cell_len(text))
    return text + blank if left else blank + text


def report_table(report: Report, width: int | None, *, ascii_only: bool = False) -> list[Text]:
    """A report: its result in a line, a row a tensor, what they add up to, and what else there is to know."""
    tensors = report.tensors
    kept = [tensor for tensor in tensors if tensor.action == "keep"]
    n_same = report.base.n_same if report.base else 0
    n_moments = report.state.n_moments if report.state else 0
    moments_bytes = sum(tensor.bytes for tensor in tensors if tensor.action == "moments")
    totals = [
        (f"{readable.plural(len(report.quantized), 'tensor')} quantized", sum(one.bytes for one in report.quantized)),
        (f"{readable.plural(len(kept), 'tensor')} kept", sum(one.bytes for one in kept)),
        *([(f"{readable.plural(n_same, 'tensor')} as in the base", 0)] if n_same else []),
        *([(f"{readable.plural(n_moments, 'tensor')} of moments", moments_bytes)] if n_moments else []),
        ("header and manifest", report.overhead_bytes),
        *([(_beside(report.n_carried), report.carried_bytes)] if report.parts else []),
        ("folder" if report.parts else "file", report.compressed_bytes),
    ]
    titles, sizes = [title for title, _ in totals], [n_bytes for _, n_bytes in totals]
    blank = [""] * len(titles)

    def texts(text: Callable[[Any], str]) -> list[str]:
        return [text(tensor) for tensor in tensors]

    def figures(attribute: str, shown: Callable[[float | None], str]) -> tuple[list[str], list[str]]:
        """The cells of quantized tensors, and the total where the report has one."""
        total = getattr(report, attribute, None)
        cells = [shown(getattr(tensor, attribute)) if tensor.has_error else "" for tensor in tensors]
        return cells, ["" if total is None else shown(total), *blank[1:]]

    def two(value: float | None) -> str:
        return readable.fixed(value, 2)

    columns = [
        Column("tensor", texts(lambda one: visible(one.name)), titles, left=True, least=40),
        Column("shape", texts(lambda one: readable.shape(one.shape)), blank, rank=4, left=True),
        Column("scheme", texts(_scheme), blank, rank=2, left=True),
        Column("rel.MSE", *figures("relative_mse", readable.error)),
        *_predicted(report, figures),
        Column("SQNR dB", *figures("sqnr_db", two), rank=3),
        Column("cosine", *figures("cosine", lambda value: readable.fixed(value, 4)), rank=6),
        Column("max error", *figures("max_abs_error", readable.error), rank=7),
        Column("bits/w", *figures("bits_per_weight", lambda value: readable.fixed(value, 3)), rank=1),
        Column("gap dB", *figures("shannon_gap_db", two), rank=5),
        Column("used", texts(_used), blank, rank=8),
        Column("entropy", *figures("assignment_entropy", two), rank=9),
        Column("size", texts(lambda one: readable.size(one.bytes)), [readable.size(n) for n in sizes]),
    ]
    styles = ["" if tensor.quantized else "dim" for tensor in tensors]
    return [
        Text(f"{visible(report.output)}: {readable.headline(report)}", style="bold"),
        Text(f"{readable.count(report.n_weights)} weights in {readable.plural(len(tensors), 'tensor')}", style="dim"),
        Text(),
        *lay_out(columns, styles, width, ascii_only=ascii_only),
        *_notes(report),
    ]


def _predicted(report: Report, figures: Callable[..., tuple[list[str], list[str]]]) -> list[Column]:
    """What statistics predict of the errors, where they were given."""
    return [
        Column(title, *figures(attribute, readable.error))
        for title, attribute in (("output MSE", "output_mse"), ("damage", "damage"))
        if any(getattr(tensor, attribute) is not None for tensor in report.tensors)
    ]


def _beside(n_files: int) -> str:
    return f"{readable.plural(n_files, 'file')} beside the weights"


def _scheme(tensor: Any) -> str:
    return tensor.action if tensor.action in ("alias", "copy") else visible(tensor.scheme)


def _used(tensor: Any) -> str:
    return "" if tensor.centroids_used is None else f"{tensor.centroids_used}/{tensor.n_centroids}"


def _notes(report: Report) -> list[Text]:
    aliases = [f"{tensor.name} is {tensor.alias_of}" for tensor in report.tensors if tensor.action == "alias"]
    notes = [f"part      {line}" for line in readable.part_lines(report)[1:]] if len(report.parts) > 1 else []
    notes += [f"kept      {line}" for line in readable.kept_reasons(report, N_NOTES)]
    copies = [f"{tensor.name} is {tensor.copy_of}" for tensor in report.tensors if tensor.action == "copy"]
    if aliases:
        notes.append(f"tied      {readable.joined(aliases, N_NOTES)}")
    if copies:
        notes.append(f"equal     {readable.joined(copies, N_NOTES)}")
    if report.dropped:
        notes.append(f"dropped   {', '.join(readable.grouped(report.dropped, N_NAMED))}")
    if report.side_bytes:
        notes.append(f"beside    {readable.side_line(report)}")
    notes += [f"warning   {warning}" for warning in report.warnings]
    if report.paper_mib is not None:
        notes.append(f"papers    {report.paper_mib:.3f} MiB by the accounting of the papers on PQ")
    notes += [
        f"{word:<10}{line}"
        for word, line in (
            ("felt", readable.felt_line(report)),
            ("trained", readable.trained_line(report)),
            ("state", readable.state_line(report)),
            ("base", readable.base_line(report)),
            ("entropy", readable.entropy_line(report)),
            ("int4", readable.int4_line(report)),
        )
        if line is not None
    ]
    return [Text(), *(Text(note, style="dim") for note in notes)] if notes else []


def plan_table(preview: Preview, width: int | None, *, ascii_only: bool = False) -> list[Text]:
    """A plan: a row a tensor with action and reason, and the size that it adds up to."""
    entries = preview.plan.entries
    tensor_bytes = sum(entry.predicted_bytes for entry in entries)
    titles = ["header and manifest", "file"]
    sizes = [preview.predicted_bytes - preview.carried_bytes - tensor_bytes, preview.predicted_bytes]
    if preview.n_carried:
        titles[1:] = [_beside(preview.n_carried), "folder"]
        sizes[1:1] = [preview.carried_bytes]
    blank = [""] * len(titles)

    def texts(text: Callable[[PlanEntry], str]) -> list[str]:
        return [text(entry) for entry in entries]

    columns = [
        Column("tensor", texts(lambda entry: visible(entry.info.name)), titles, left=True, least=36),
        Column("shape", texts(lambda entry: readable.shape(entry.info.shape)), blank, rank=3, left=True),
        Column("dtype", texts(lambda entry: entry.info.dtype), blank, rank=4, left=True),
        Column("kind", texts(lambda entry: visible(entry.kind)), blank, rank=2, left=True),
        Column("action", texts(_planned_action), blank, left=True),
        Column("size", texts(lambda entry: readable.size(entry.predicted_bytes)), [readable.size(n) for n in sizes]),
        Column("reason", texts(lambda entry: visible(entry.reason)), blank, rank=1, left=True, least=22),
    ]
    why = [
        (action, line)
        for action in dict.fromkeys(entry.action for entry in entries)
        if action not in ("alias", "copy")
        for line in readable.reasons(
            [(entry.info.name, entry.reason, entry.predicted_bytes) for entry in entries if entry.action == action],
            N_NOTES,
        )
    ]
    is_coded = [entry.action not in ("keep", "moments", "alias", "copy", "base") for entry in entries]
    why += _planned_state(entries)
    if preview.prediction is not None:
        foreseen = preview.prediction
        cost = f"{readable.about(foreseen.seconds)}, {readable.size(foreseen.memory_bytes)} of memory"
        why.append(("cost", f"about {cost}, by what something small took on this machine just now"))
    styles = ["" if coded else "dim" for coded in is_coded]
    quantized = sum(is_coded)
    ratio = preview.original_bytes / preview.predicted_bytes if preview.predicted_bytes else 0.0
    before, after = readable.size(preview.original_bytes), readable.size(preview.predicted_bytes)
    return [
        Text(f"{visible(str(preview.source))}: {before} -> {after} predicted  {readable.times(ratio)}", style="bold"),
        Text(f"{quantized} of {readable.plural(len(entries), 'tensor')} to be quantized", style="dim"),
        Text(),
        *lay_out(columns, styles, width, ascii_only=ascii_only),
        *([Text()] if why else []),
        *(Text(f"{word:<10}{line}", style="dim") for word, line in why),
    ]


def _planned_state(entries: Sequence[PlanEntry]) -> list[tuple[str, str]]:
    """A line on the training state of a plan; none where there is none."""
    state = [entry for entry in entries if entry.info.role != "model" and entry.action != "alias"]
    if not state:
        return []
    dense, planned = (sum(sizes) for sizes in zip(*((e.info.n_bytes, e.predicted_bytes) for e in state), strict=True))
    n_moments = sum(entry.action == "moments" for entry in state)
    held = f"{n_moments:,} in eight bits a value" if n_moments else "bit for bit"
    sizes = f"{readable.size(dense)} -> {readable.size(planned)}"
    return [("state", f"{readable.plural(len(state), 'tensor')}, {sizes}: {held}")]


def _planned_action(entry: PlanEntry) -> str:
    """`pq 8x256`, `keep`, `alias`."""
    return f"{entry.action} {entry.scheme.block_size}x{entry.scheme.n_centroids}" if entry.scheme else entry.action


def plan_document(preview: Preview) -> dict[str, object]:
    """A plan as JSON: the fields of a report that are known before any weight is read."""
    return {
        "source": str(preview.source),
        "output": str(preview.output),
        "original_bytes": preview.original_bytes,
        "predicted_bytes": preview.predicted_bytes,
        "predicted_ratio": preview.original_bytes / preview.predicted_bytes if preview.predicted_bytes else None,
        "predicted_seconds": None if preview.prediction is None else preview.prediction.seconds,
        "predicted_memory_bytes": None if preview.prediction is None else preview.prediction.memory_bytes,
        "dropped": list(preview.dropped),
        "tensors": [
            {
                "name": entry.info.name,
                "shape": list(entry.info.shape),
                "dtype": entry.info.dtype,
                "kind": entry.kind,
                "action": entry.action,
                "reason": entry.reason,
                "block_size": entry.scheme.block_size if entry.scheme else None,
                "n_centroids": entry.scheme.n_centroids if entry.scheme else None,
                "predicted_bytes": entry.predicted_bytes,
            }
            for entry in preview.plan.entries
        ],
    }


def record_table(records: Sequence[Mapping[str, Any]], width: int | None, *, ascii_only: bool = False) -> list[Text]:
    """Records of any fields as a table: a column a field, in order of appearance; the last ones go first if narrow."""
    fields = list(dict.fromkeys(field for record in records for field in record))
    columns = [
        Column(
            str(field),
            [_value(record.get(field), field) for record in records],
            rank=0 if index == 0 else index,
            left=not all(isinstance(record.get(field), (int, float, type(None))) for record in records),
            least=28 if index == 0 else 12,
        )
        for index, field in enumerate(fields)
    ]
    return lay_out(columns, [""] * len(records), width, ascii_only=ascii_only)


def field_lines(document: Mapping[str, Any], indent: int = 0) -> list[Text]:
    """A JSON object as indented lines of `name  value`."""
    width = max((len(str(key)) for key in document), default=0)
    lines = []
    for key, value in document.items():
        name = Text(" " * indent + visible(f"{key:{width}}"), style="bold")
        if isinstance(value, Mapping) and value:
            lines += [name, *field_lines(value, indent + 2)]
        else:
            lines.append(Text.assemble(name, "  ", elide(_value(value, str(key)), MOST_CELLS)))
    return lines


def _value(value: Any, field: str) -> str:
    if value is None:
        return readable.UNKNOWN
    if field == "shape" and isinstance(value, Sequence):
        return readable.shape(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item, "") for item in value) or readable.UNKNOWN
    return visible(f"{value:.6g}" if isinstance(value, float) else str(value))


def statistics_table(rows: Sequence[Seen], width: int | None, *, ascii_only: bool = False) -> list[Text]:
    """What a file of statistics knows: a row a weight, and what they add up to."""

    def forms(row: Seen) -> str:
        return f"as {row.shares}" if row.shares else row.form

    total = [readable.plural(len(rows), "weight")]
    columns = [
        Column("weight", [visible(row.name) for row in rows], total, left=True, least=FEWEST_CELLS),
        Column("samples", [f"{row.n_samples:,.0f}" for row in rows], [""]),
        Column("inputs", ["" if row.width is None else f"{row.width:,}" for row in rows], [""]),
        Column("moments", [visible(forms(row)) for row in rows], [""], rank=1, left=True, least=FEWEST_CELLS),
        Column("lookups", [f"{row.n_lookups:,.0f}" if row.n_lookups else "" for row in rows], [""], rank=3),
        Column("gradient", [_gradient(row.gradient) for row in rows], [""], rank=2),
        Column("size", [readable.size(row.bytes) for row in rows], [readable.size(sum(row.bytes for row in rows))]),
    ]
    lines = lay_out(columns, [""] * len(rows), width, ascii_only=ascii_only)
    tied = [f"{row.name} = {', '.join(row.aliases)}" for row in rows if row.aliases]
    if tied:
        lines += [Text(), Text(f"tied: {readable.joined(tied, N_NOTES)}")]
    if not any(row.gradient is not None for row in rows):
        lines += [Text(), Text("no gradients: how much the output feels each layer is not known")]
    return lines


def _gradient(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def comparison_lines(found: Comparison, width: int | None, *, ascii_only: bool = False) -> list[Text]:
    """How far a network is from what it was: a line a figure, then a row a layer where they were compared."""
    figures = [
        ("examples", f"{found.n_examples:,}"),
        ("relative MSE of the output", readable.error(found.relative_mse)),
        ("cosine of the output", f"{found.cosine:.5f}"),
        ("KL divergence", _figure(found.kl_divergence, "{:.5f} nats")),
        ("same most likely class", _figure(found.agreement, "{:.2%}")),
        ("perplexity, original", _figure(found.dense_perplexity, "{:.4g}")),
        ("perplexity, decoded", _figure(found.perplexity, "{:.4g}")),
        ("same nearest neighbour", _figure(found.neighbours, "{:.2%}")),
    ]
    lines = [Text(), Text("the network, decoded weights against the original's:", style="bold")]
    lines += [Text(f"  {title:<27} {value}") for title, value in figures if value]
    if found.layers:
        columns = [
            Column("output of", [visible(layer.name) for layer in found.layers], left=True, least=FEWEST_CELLS),
            Column("rel. MSE", [readable.error(layer.relative_mse) for layer in found.layers]),
            Column("cosine", [f"{layer.cosine:.5f}" for layer in found.layers]),
        ]
        lines += [Text(), *lay_out(columns, [""] * len(found.layers), width, ascii_only=ascii_only)]
    return lines


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
