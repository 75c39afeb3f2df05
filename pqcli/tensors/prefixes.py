"""Names that differ by a prefix alone: a checkpoint of DataParallel calls every tensor `module.` and so on."""

from __future__ import annotations

from collections.abc import Sequence


def matched(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Their names by ours where all of one side begin with what the other side lacks.

    Empty where some name is known as it is, or where nothing makes the names the same.
    """
    if set(ours) & set(theirs):
        return {}
    for first, second, is_ours in ((ours, theirs, True), (theirs, ours, False)):
        prefixes = {name[: -len(other)] for name in first for other in second if name.endswith(f".{other}")}
        for prefix in prefixes:
            longer = {name: name.removeprefix(prefix) for name in first if name.removeprefix(prefix) in set(second)}
            if longer and all(name.startswith(prefix) for name in first):
                return longer if is_ours else {other: name for name, other in longer.items()}
    return {}
