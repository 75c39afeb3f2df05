"""Makes `files-v1` (container and JSON): small files inside a container. It was made once; never make it again.

python -m tests.golden.make_files_v1
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import pqcli
from tests.golden.make_plain_v1 import HERE, digests

FILES = {
    "config.json": b'{"a": 1}',
    "1_Pooling/config.json": b"{}",
    "empty": b"",
    "gr\u00f6\u00dfe.txt": bytes(range(256)),
}


def main() -> None:
    """Write the files beside this script."""
    with tempfile.TemporaryDirectory() as name:
        folder, target = Path(name), HERE / "files-v1.pq.safetensors"
        generator = torch.Generator().manual_seed(0)
        state = {"w": torch.randn(32, 16, generator=generator), "b": torch.randn(3, generator=generator)}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        for path, data in FILES.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)
        pqcli.compress(folder, target, pqcli.Recipe(n_centroids=8, n_iter=2), embed_files=True)
        text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
        (HERE / "files-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
