"""The report of a folder: what the reports of its containers add up to, with the files beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pqcli.reports.figures import Report, TensorReport


def folder_report(
    parts: Mapping[str, Report],
    *,
    source: str,
    output: str,
    side: Mapping[str, int],
    recipe: Mapping[str, object],
    seconds: float | None = None,
) -> Report:
    """The sum of `parts`, which are reports by the label of their container; `side` are sizes of the other files.

    The files beside the weights count before and after. Tensors are called as in the folder: LABEL/NAME.
    """
    carried_bytes = sum(side.values())
    papers = [part.paper_bytes for part in parts.values()]
    known = [n_bytes for n_bytes in papers if n_bytes is not None]
    return Report(
        source=source,
        output=output,
        original_bytes=carried_bytes + sum(part.original_bytes for part in parts.values()),
        compressed_bytes=carried_bytes + sum(part.compressed_bytes for part in parts.values()),
        tensors=tuple(tensor for label, part in parts.items() for tensor in _named(label, part)),
        seconds=seconds,
        dropped=tuple(what for part in parts.values() for what in part.dropped),
        recipe=recipe,
        paper_bytes=sum(known) if len(known) == len(papers) else None,
        warnings=tuple(warning for part in parts.values() for warning in part.warnings),
        parts=tuple(parts.values()),
        n_carried=len(side),
        carried_bytes=carried_bytes,
    )


def _named(label: str, part: Report) -> Iterator[TensorReport]:
    for tensor in part.tensors:
        if label:
            alias_of = None if tensor.alias_of is None else f"{label}/{tensor.alias_of}"
            copy_of = None if tensor.copy_of is None else f"{label}/{tensor.copy_of}"
            tensor = replace(tensor, name=f"{label}/{tensor.name}", alias_of=alias_of, copy_of=copy_of)
        yield tensor
