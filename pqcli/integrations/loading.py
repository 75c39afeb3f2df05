"""A Hugging Face folder becomes a model that runs: transformers builds it, from this disk only and without its code.

The class is the one that the config's `architectures` names, so that a language model has its head and a classifier
its own. Code that lies in the folder is never run, and nothing is asked of a network.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pqcli.errors import MissingExtraError, StatsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
INSTALL = "pip install 'pqcli[transformers]'"


@dataclass(frozen=True)
class Runnable:
    """A model and what belongs to it.

    `missing` names parameters that the checkpoint does not hold and that are therefore random. `pooling` is how a
    sentence encoder (a folder with `modules.json`) makes one vector of a sentence: "mean" or "cls"; None for others.
    `max_length` is the largest number of tokens that it takes, as far as its files tell.
    """

    path: Path
    model: Any
    tokenizer: Any
    missing: tuple[str, ...]
    pooling: str | None
    max_length: int | None

    @property
    def is_causal(self) -> bool:
        """Whether it reads from left to right: a language model, or one whose parts were made from one."""
        return bool(type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel")))

    @property
    def is_masked(self) -> bool:
        """Whether it guesses masked tokens."""
        return bool(type(self.model).__name__.endswith("ForMaskedLM"))

    @property
    def is_pair(self) -> bool:
        """Whether it is an encoder with a decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def reads_sentences(self) -> bool:
        """Whether a line of a text is an example of its own to it: encoders, classifiers."""
        return not (self.is_causal or self.is_pair)


def load(folder: Path, dtype: str = "float32", weights: Mapping[str, torch.Tensor] | None = None) -> Runnable:
    """The model of a folder, in evaluation mode on the CPU, none of its parameters asking for gradients.

    `weights` take the place of those in the folder, by the names of its checkpoint.

    Raises MissingExtraError without transformers, and StatsError where the folder is none of its models, reads
    something else than text, or would need code of its own.
    """
    transformers = _transformers()
    if not (folder / "config.json").is_file():
        raise StatsError(f"'{folder}' has no config.json; name the folder of a Hugging Face model")
    with _silent(transformers), _told(folder):
        config = transformers.AutoConfig.from_pretrained(str(folder), **_OFFLINE)
        tokenizer = _tokenizer(transformers, folder)
        kind = _class_of(transformers, config)
        place, given = (str(folder), {}) if weights is None else (None, {"state_dict": dict(weights)})
        model, report = kind.from_pretrained(
            place, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **given, **_OFFLINE
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise StatsError(
            f"'{folder}' ({type(model).__name__}) reads {model.main_input_name}, not text; collect its statistics in "
            "Python with pqcli.collect(model)"
        )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one product an expert: the others show no weights
    model.eval().requires_grad_(False)
    missing = tuple(sorted(name for name in report["missing_keys"] if name in dict(model.named_parameters())))
    return Runnable(folder, model, tokenizer, missing, _pooling(folder), _max_length(folder, config, tokenizer))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(f"running a model needs transformers; {INSTALL}") from None
    return transformers


def _class_of(transformers: Any, config: Any) -> Any:
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return transformers.AutoModel


def _tokenizer(transformers: Any, folder: Path) -> Any:
    """The folder's own tokenizer; a lone tokenizer.json is enough."""
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(str(folder), **_OFFLINE)


def _pooling(folder: Path) -> str | None:
    """How sentence-transformers would pool, from `modules.json`; the mean where that says nothing that we know."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for module in json.loads(path.read_text()):
            if str(module["type"]).rpartition(".")[2] == "Pooling":
                settings = json.loads((folder / Path(module["path"]).name / "config.json").read_text())
                if settings.get("pooling_mode_cls_token") or settings.get("pooling_mode") == "cls":
                    return "cls"
    return "mean"


def _max_length(folder: Path, config: Any, tokenizer: Any) -> int | None:
    lengths = [getattr(tokenizer, "model_max_length", None)]
    lengths += [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        lengths.append(json.loads((folder / "sentence_bert_config.json").read_text()).get("max_seq_length"))
    known = [length for length in lengths if isinstance(length, int) and 0 < length < 1 << 24]
    return min(known, default=None)


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """No bars, no reports, no network: as they were before, afterwards."""
    from huggingface_hub import constants

    log = transformers.utils.logging
    level, had_bars, offline = log.get_verbosity(), log.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        log.set_verbosity(level)
        constants.HF_HUB_OFFLINE = offline
        if had_bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What transformers raises, in one line that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        said = str(error)
        if "trust_remote_code" in said:
            raise StatsError(
                f"'{folder}' is a model whose code lies in its own folder; pqcli runs no such code. Load the model in "
                "your own program and use pqcli.collect(model) there"
            ) from error
        line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
        raise StatsError(f"transformers cannot load '{folder}': {line}") from error
