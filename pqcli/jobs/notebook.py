"""How previews and comparisons show themselves in a Python session."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pqcli.notebook import MOST_ROWS, page
from pqcli.readable import about, error, plural, shape, size, times, visible

if TYPE_CHECKING:
    from pqcli.jobs.compare import Comparison
    from pqcli.jobs.preview import Preview


def preview_line(preview: Preview) -> str:
    """What stands for a preview where Python prints one."""
    return f"<Preview of {visible(str(preview.output))}: {_sizes(preview)}; {_actions(preview)}>"


def preview_page(preview: Preview) -> str:
    """The preview as a notebook shows it, quantized tensors first."""
    ordered = sorted(preview.plan.entries, key=lambda entry: entry.action in ("keep", "alias"))
    rows = (
        (
            entry.info.name, shape(entry.info.shape), entry.info.dtype,
            f"{entry.action} {entry.scheme.block_size}x{entry.scheme.n_centroids}" if entry.scheme else entry.action,
            size(entry.predicted_bytes), entry.reason,
        )
        for entry in ordered[:MOST_ROWS]
    )  # fmt: skip
    columns = ("tensor", "shape", "dtype", "action", "size", "reason")
    title = f"{preview.source} -> {preview.output}"
    facts = [_sizes(preview), _actions(preview)]
    if preview.prediction is not None:
        facts.append(f"about {about(preview.prediction.seconds)}, {size(preview.prediction.memory_bytes)} of memory")
    return page(title, facts, columns, rows, len(ordered))


def comparison_line(found: Comparison) -> str:
    """What stands for a comparison."""
    figures = [f"relative MSE {error(found.relative_mse)}", f"cosine {found.cosine:.5f}"]
    if found.kl_divergence is not None:
        figures.append(f"KL divergence {found.kl_divergence:.5f} nats")
    if found.perplexity is not None and found.dense_perplexity is not None:
        figures.append(f"perplexity {found.dense_perplexity:.4g} -> {found.perplexity:.4g}")
    if found.agreement is not None:
        figures.append(f"same most likely class {found.agreement:.2%}")
    if found.neighbours is not None:
        figures.append(f"same nearest neighbour {found.neighbours:.2%}")
    layers = f"; {plural(len(found.layers), 'layer')}" if found.layers else ""
    return f"<Comparison of {plural(found.n_examples, 'example')}: {', '.join(figures)}{layers}>"


def comparison_page(found: Comparison) -> str:
    """The comparison as a notebook shows it, the layers with the largest error first."""
    ordered = sorted(found.layers, key=lambda layer: -layer.relative_mse)
    rows = ((layer.name, error(layer.relative_mse), f"{layer.cosine:.5f}") for layer in ordered[:MOST_ROWS])
    facts = comparison_line(found).strip("<>").partition(": ")[2].split(", ")
    title = f"the network's output, decoded against original ({plural(found.n_examples, 'example')})"
    return page(title, facts, ("output of", "rel. MSE", "cosine"), rows, len(ordered))


def _sizes(preview: Preview) -> str:
    ratio = preview.original_bytes / preview.predicted_bytes if preview.predicted_bytes else 0.0
    return f"{size(preview.original_bytes)} -> {size(preview.predicted_bytes)} predicted  {times(ratio)}"


def _actions(preview: Preview) -> str:
    actions = Counter(entry.action for entry in preview.plan.entries)
    told = ", ".join(f"{n:,} {action}" for action, n in actions.most_common())
    return f"{plural(len(preview.plan.entries), 'tensor')}" + (f" ({told})" if told else "")
