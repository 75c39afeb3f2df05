"""Makes `NAME-checksum-v1` (container and JSON) for every codec. They were made once; never make them again.

    python -m tests.golden.make_checksum_v1

The checkpoints and recipes of the older golden files, written with the feature `checksum`.
"""

import json
import tempfile
from pathlib import Path

import torch

import pqcli
from tests.golden import make_mixing_v1, make_plain_v1
from tests.golden.make_plain_v1 import HERE, digests


def main() -> None:
    """Write the files beside this script."""
    plain, mixing = make_plain_v1.checkpoint(), make_mixing_v1.checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        for name, state, recipe in (
            ("plain", plain, make_plain_v1.recipe()),
            ("trellis", plain, pqcli.Recipe(codec="trellis", quality="small")),
            ("ecpq", plain, pqcli.Recipe(rate_weight=0.05)),
            ("trellis-mixing", mixing, pqcli.Recipe(codec="trellis", quality="small")),
        ):
            source, target = Path(folder) / "model.pt", HERE / f"{name}-checksum-v1.pq.safetensors"
            torch.save(state, source)
            pqcli.compress(source, target, recipe)
            text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
            (HERE / f"{name}-checksum-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
