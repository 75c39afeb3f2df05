"""Makes `trellis-v1` and `ecpq-v1` (container and JSON each). They were made once; a change must not make them again.

    python -m tests.golden.make_coded_v1

The same checkpoint as in `make_plain_v1`, by the codecs for whole checkpoints, with kept tensors coded without loss.
"""

import json
import tempfile
from pathlib import Path

import torch

import pqcli
from tests.golden.make_plain_v1 import HERE, checkpoint, digests


def main() -> None:
    """Write the files beside this script."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.pt"
        torch.save(checkpoint(), source)
        for name, recipe in (
            ("trellis-v1", pqcli.Recipe(codec="trellis", quality="small")),
            ("ecpq-v1", pqcli.Recipe(rate_weight=0.05)),
        ):
            target = HERE / f"{name}.pq.safetensors"
            pqcli.compress(source, target, recipe)
            text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
            (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
