"""What a compression cost, as data: one `TensorReport` a tensor, one `Report` a file.

A report is built by whoever has measured something (compressing, or comparing two files) and read by whoever shows it
(table, JSON, CSV, HTML). Nothing here opens a file, prints, or needs torch. The figures:

- `relative_mse` = |W - W_hat|^2 / |W|^2. Over several tensors both sums run over all their weights together, so a
  tensor counts by its energy, not by its size.
- `sqnr_db` = -10 log10(relative_mse): signal to quantization noise, 6.02 dB for every bit spent ideally.
- `bits_per_weight` counts all that is stored for a tensor: codebook, assignments and scales.
- `shannon_gap_db`: how far below the rate-distortion bound of a Gaussian source the result stays, see `shannon_gap_db`.
- `entropy_bytes`: what the assignments would take if each tensor's were coded at their order-0 entropy, by a table of
  their own and without looking at neighbours. Fixed-width assignments (plain PQ) take more; coded ones may take less,
  because their coder does look at neighbours.
- `int4_bytes` and `int4_relative_mse`: the quantized tensors as integers of four bits, rounded to nearest, in groups of
  128 that share a float16 scale: what a size and an error are worth.
- `ratio` = bytes of the original file / bytes of the compressed file, both on disk.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from pqcli.reports import notebook

INT4_GROUP = 128
"""Weights that share a scale in the int4 baseline; the scale takes two bytes."""
DB_PER_BIT = 20 * math.log10(2)
"""6.02 dB: what one more bit per weight gains an ideal coder."""


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor: what was done to it, why, at what size, with what error.

    `action` is "keep" (stored bit-exact), "moments" (an optimizer's, in eight bits a value: they have errors, but are
    no weights, and count in no figure of weights), "alias" (another name of `alias_of`, stores nothing), "copy" (a
    tensor of its own with the bytes of `copy_of`, stores nothing and has its error), "base" (as the base has it, stores
    nothing), or the codec that quantized it ("pq"). `difference` says that what is stored is the difference to the
    base's, `trained` that it was trained after it had been compressed: its error is known only where the original was
    at hand. `scheme` says the same to a person ("PQ 8x256"). `bytes` is this tensor's payload on disk. `energy` is the
    sum of squares of the original weights. `assignment_entropy` is in bits per assignment; `assignment_bytes` is what
    the assignments (with a codec for whole checkpoints, all that is coded for the tensor) take, `entropy_bytes` what
    they would take at their entropy. `output_mse` is the squared error of the layer's output over the output's own
    square, and `damage` the mean squared error at the network's output that comes of it, both predicted from
    statistics. What was not measured, or has no meaning for the action, is None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    reason: str
    scheme: str
    n_weights: int
    original_bytes: int
    bytes: int
    kind: str = ""
    block_size: int | None = None
    n_centroids: int | None = None
    bits_per_weight: float | None = None
    relative_mse: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    energy: float | None = None
    centroids_used: int | None = None
    assignment_entropy: float | None = None
    alias_of: str | None = None
    assignment_bytes: int | None = None
    entropy_bytes: int | None = None
    int4_relative_mse: float | None = None
    copy_of: str | None = None
    difference: bool = False
    trained: bool = False
    output_mse: float | None = None
    damage: float | None = None
    role: str = "model"

    def __repr__(self) -> str:
        return notebook.tensor_line(self)

    @property
    def has_error(self) -> bool:
        """Whether it may come back as other values: quantized weights, and moments."""
        return self.quantized or self.action == "moments"

    @property
    def quantized(self) -> bool:
        """Whether weights are stored for it that may differ from the original ones."""
        return self.action not in ("keep", "moments", "alias", "copy", "base")

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB; inf for a lossless tensor, None where the error is unknown."""
        return sqnr_db(self.relative_mse)

    @property
    def shannon_gap_db(self) -> float | None:
        """Decibels between this tensor and the Gaussian bound at its bits per weight; see `shannon_gap_db`."""
        return shannon_gap_db(self.relative_mse, self.bits_per_weight) if self.quantized else None

    @property
    def int4_bytes(self) -> int | None:
        """What this tensor would take as int4 in groups; None where it is not quantized."""
        return int4_bytes(self.n_weights) if self.quantized else None

    def to_json(self) -> dict[str, object]:
        """Every field and derived figure under its own name; None where a number is missing or not finite."""
        return {column: _jsonable(getattr(self, column)) for column in TENSOR_COLUMNS}


@dataclass(frozen=True, kw_only=True)
class StateReport:
    """What the training state of a file takes: optimizer moments and the like.

    `n_tensors` of `original_bytes` take `bytes`, `n_kept` of them bit for bit, and `n_moments` in eight bits a value,
    with the `relative_mse` of all of these together.
    """

    n_tensors: int
    original_bytes: int
    bytes: int
    n_kept: int
    n_moments: int
    relative_mse: float | None


@dataclass(frozen=True, kw_only=True)
class BaseReport:
    """What the base of a file spares: its `hash`, and the `path` where it was then.

    `n_same` tensors of `same_original_bytes` are the base's and take nothing; `n_differences` are stored as differences
    to it, in `differences_bytes` where the tensors themselves have `differences_original_bytes`.
    """

    hash: str
    path: str
    n_same: int
    same_original_bytes: int
    n_differences: int
    differences_original_bytes: int
    differences_bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """One compressed file: its tensors in the checkpoint's order, and what they add up to.

    `dropped` names what the source held and the output does not. `paper_bytes` is the size by the papers' own
    accounting (log2(k) bits a block, fp16 codebooks, fp32 for the rest, running statistics not counted), None where
    anything but plain PQ was at work. `warnings` say what a budget gave up; of single rows only `compress` knows.
    `side_bytes` is the size of the files beside the weights that are not in the output, and in neither of the sizes.
    `base` tells of the base, where the file has one. `resumed` says what was done of it by runs that were killed
    before, which `seconds` does not count; nothing where there were none.

    Of a folder, `parts` are the reports of its containers, and `n_carried` files with `carried_bytes` lie beside them,
    before as after, and are in both sizes; a file has none of these.
    """

    source: str
    output: str
    original_bytes: int
    compressed_bytes: int
    tensors: tuple[TensorReport, ...]
    seconds: float | None = None
    dropped: tuple[str, ...] = ()
    recipe: Mapping[str, object] = field(default_factory=dict)
    paper_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    parts: tuple[Report, ...] = ()
    n_carried: int = 0
    carried_bytes: int = 0
    side_bytes: int = 0
    base: BaseReport | None = None
    resumed: str = ""

    def __repr__(self) -> str:
        return notebook.report_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.report_page(self)

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """The tensors whose weights may differ from the original ones."""
        return tuple(tensor for tensor in self.tensors if tensor.quantized)

    @property
    def state(self) -> StateReport | None:
        """What training state takes; None where there is none."""
        return state_of(self.tensors)

    @property
    def ratio(self) -> float:
        """Bytes of the original file per byte of the compressed one."""
        return self.original_bytes / self.compressed_bytes if self.compressed_bytes else math.inf

    @property
    def ratio_with_side(self) -> float:
        """The same with the files that have to be kept beside the output counted in both."""
        compressed = self.compressed_bytes + self.side_bytes
        return (self.original_bytes + self.side_bytes) / compressed if compressed else math.inf

    @property
    def n_weights(self) -> int:
        """Weights of all tensors; those with several names count once."""
        return sum(tensor.n_weights for tensor in self.tensors if tensor.action != "alias")

    @property
    def n_quantized_weights(self) -> int:
        """Weights of the quantized tensors."""
        return sum(tensor.n_weights for tensor in self.quantized)

    @property
    def tensor_bytes(self) -> int:
        """Payload bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def overhead_bytes(self) -> int:
        """What the containers hold beside tensors: header, manifest, alignment."""
        return self.compressed_bytes - self.tensor_bytes - self.carried_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Payload bits of the quantized tensors per quantized weight; None when nothing is quantized."""
        weights = self.n_quantized_weights
        return 8 * sum(tensor.bytes for tensor in self.quantized) / weights if weights else None

    @property
    def relative_mse(self) -> float | None:
        """|W - W_hat|^2 / |W|^2 over all quantized weights together.

        None when nothing is quantized, or when the error of a quantized tensor is unknown.
        """
        return _together([(tensor.relative_mse, tensor.energy) for tensor in self.quantized])

    @property
    def assignment_bytes(self) -> int | None:
        """Bytes of all assignments; None when nothing is quantized or a tensor's are unknown."""
        return _sum([tensor.assignment_bytes for tensor in self.quantized])

    @property
    def entropy_bytes(self) -> int | None:
        """Bytes of all assignments if each tensor's were coded at their order-0 entropy; None where that is unknown."""
        return _sum([tensor.entropy_bytes for tensor in self.quantized])

    @property
    def int4_bytes(self) -> int | None:
        """Bytes of the quantized tensors as int4 in groups; None when nothing is quantized."""
        return _sum([tensor.int4_bytes for tensor in self.quantized])

    @property
    def int4_relative_mse(self) -> float | None:
        """Relative MSE of the quantized tensors as int4 in groups; None where the original was not at hand."""
        return _together([(tensor.int4_relative_mse, tensor.energy) for tensor in self.quantized])

    @property
    def damage(self) -> float | None:
        """What is predicted of the tensors' errors together; None where statistics know of none of them."""
        known = [tensor.damage for tensor in self.quantized if tensor.damage is not None]
        return sum(known) if known else None

    @property
    def has_statistics(self) -> bool:
        """Whether bits were spent by statistics of inputs."""
        return self.recipe.get("stats") is not None

    @property
    def max_abs_error(self) -> float | None:
        """The largest error of a single weight; None when nothing is quantized or an error is unknown."""
        errors = [tensor.max_abs_error for tensor in self.quantized]
        known = [error for error in errors if error is not None]
        if not errors or len(known) < len(errors):
            return None
        return math.nan if any(math.isnan(error) for error in known) else max(known)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB over the quantized weights together."""
        return sqnr_db(self.relative_mse)

    @property
    def shannon_gap_db(self) -> float | None:
        """Decibels to the Gaussian bound, all quantized weights taken as one source; see `shannon_gap_db`."""
        return shannon_gap_db(self.relative_mse, self.bits_per_weight)

    @property
    def paper_mib(self) -> float | None:
        """`paper_bytes` in MiB, the unit of the papers' tables."""
        return None if self.paper_bytes is None else self.paper_bytes / 2**20

    def to_json(self) -> dict[str, object]:
        """The document that `--json` prints; strictly JSON: an infinite or undefined number is null.

        Fields are added over time, never renamed or removed.
        """
        actions = [tensor.action for tensor in self.tensors]
        document = {
            "source": self.source,
            "output": self.output,
            "original_bytes": self.original_bytes,
            "compressed_bytes": self.compressed_bytes,
            "ratio": self.ratio,
            "side_bytes": self.side_bytes,
            "ratio_with_side": self.ratio_with_side,
            "relative_mse": self.relative_mse,
            "sqnr_db": self.sqnr_db,
            "shannon_gap_db": self.shannon_gap_db,
            "bits_per_weight": self.bits_per_weight,
            "max_abs_error": self.max_abs_error,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "paper_mib": self.paper_mib,
            "totals": {
                "n_tensors": len(actions),
                "n_quantized": len(self.quantized),
                "n_kept": actions.count("keep"),
                "n_aliases": actions.count("alias"),
                "n_copies": actions.count("copy"),
                "n_weights": self.n_weights,
                "n_quantized_weights": self.n_quantized_weights,
                "quantized_bytes": sum(tensor.bytes for tensor in self.quantized),
                "kept_bytes": sum(tensor.bytes for tensor in self.tensors if tensor.action == "keep"),
                "tensor_bytes": self.tensor_bytes,
                "overhead_bytes": self.overhead_bytes,
                "paper_bytes": self.paper_bytes,
                "assignment_bytes": self.assignment_bytes,
                "entropy_bytes": self.entropy_bytes,
                "int4_bytes": self.int4_bytes,
                "int4_relative_mse": self.int4_relative_mse,
                "damage": self.damage,
            },
            "recipe": self.recipe,
            "base": None if self.base is None else asdict(self.base),
            "state": None if self.state is None else asdict(self.state),
            "dropped": self.dropped,
            "warnings": self.warnings,
            "parts": [part.headline() for part in self.parts],
            "n_carried": self.n_carried,
            "carried_bytes": self.carried_bytes,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }
        return {key: _jsonable(value) for key, value in document.items()}

    def headline(self) -> dict[str, object]:
        """The figures of the whole, without its tensors."""
        return {
            "output": self.output,
            "original_bytes": self.original_bytes,
            "compressed_bytes": self.compressed_bytes,
            "ratio": self.ratio,
            "relative_mse": self.relative_mse,
            "bits_per_weight": self.bits_per_weight,
            "n_tensors": len(self.tensors),
        }

    def to_csv(self) -> str:
        """A header line, then a line a tensor; columns and names as in the JSON.

        An unknown or infinite number is an empty cell. A text that a spreadsheet would take for a formula gets a
        leading apostrophe, because names come from strangers.
        """
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(TENSOR_COLUMNS)
        for tensor in self.tensors:
            writer.writerow([_cell(value) for value in tensor.to_json().values()])
        return lines.getvalue()


TENSOR_COLUMNS = (*(item.name for item in fields(TensorReport)), "sqnr_db", "shannon_gap_db", "int4_bytes")
"""Every figure of a tensor, in the order of JSON and CSV."""


def state_of(tensors: Sequence[TensorReport]) -> StateReport | None:
    """What the training state among some tensors takes; None where there is none."""
    state = [tensor for tensor in tensors if tensor.role != "model" and tensor.action != "alias"]
    moments = [tensor for tensor in state if tensor.action == "moments"]
    if not state:
        return None
    return StateReport(
        n_tensors=len(state),
        original_bytes=sum(tensor.original_bytes for tensor in state),
        bytes=sum(tensor.bytes for tensor in state),
        n_kept=sum(tensor.action == "keep" for tensor in state),
        n_moments=len(moments),
        relative_mse=_together([(tensor.relative_mse, tensor.energy) for tensor in moments]),
    )


def int4_bytes(n_weights: int) -> int:
    """Bytes of so many weights as int4 in groups: 4.125 bits a weight, both parts rounded up."""
    return -(-n_weights // 2) + 2 * -(-n_weights // INT4_GROUP)


def _together(errors: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The relative MSE of all of (relative MSE, energy) together; None for none and where one is unknown."""
    energy = noise = 0.0
    for mse, weight in errors:
        if mse is None or weight is None:
            return None
        energy += weight
        noise += mse * weight
    if not errors:
        return None
    return noise / energy if energy else noise


def _sum(sizes: Sequence[int | None]) -> int | None:
    """The sum; None for none and where one is unknown."""
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None


def sqnr_db(relative_mse: float | None) -> float | None:
    """-10 log10(relative_mse): inf for no error, None for an unknown one."""
    if relative_mse is None or math.isnan(relative_mse):
        return relative_mse
    return -10 * math.log10(relative_mse) if relative_mse > 0 else math.inf


def shannon_gap_db(relative_mse: float | None, bits_per_weight: float | None) -> float | None:
    """The SQNR that a Gaussian source allows at this rate, minus the SQNR reached.

    A source of independent Gaussian values of variance s^2 cannot be coded at R bits each with an error below
    D = s^2 2^(-2R) (Cover and Thomas, Elements of Information Theory, theorem 10.3.2): 6.02 R dB. 0 would be a perfect
    coder of such a source; plain PQ of 8 weights in 8 bits stays about 1.2 dB away, plus what its codebook costs.

    It is a yardstick, not a bound on what is possible for real weights: they are neither Gaussian nor independent nor
    of one variance. For a given variance the Gaussian is the hardest source, so a coder that uses heavy tails or
    rows of different scale may get below 0; a lossless result is at -inf.
    """
    reached = sqnr_db(relative_mse)
    return None if reached is None or bits_per_weight is None else DB_PER_BIT * bits_per_weight - reached


def _jsonable(value: object) -> object:
    """`value` as JSON can hold it: tuples as lists, and None for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _cell(value: object) -> object:
    if isinstance(value, list):
        return "x".join(map(str, value))
    if not isinstance(value, str):
        return "" if value is None else value
    text = value.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
