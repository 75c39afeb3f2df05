"""A process in which some packages cannot be imported decodes containers in every way, and tells what came out.

    python decoding_alone.py PACKAGE,PACKAGE FOLDER CONTAINER ... -- CONTAINER ...

Commands are run on those that come first; what they decode goes into FOLDER, numbered as they come. What is told is
JSON: by container the dtype, shape and SHA-256 of every tensor, what `verify` finds, what commands end with; and the
packages that were imported.
"""

import contextlib
import hashlib
import io
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Blocked(MetaPathFinder):
    """Finds no module of these packages, whatever is installed."""

    def __init__(self, names):
        self.names = {*names.split(",")}

    def find_spec(self, name, path=None, target=None):
        """Raise where the name is one of them."""
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def told(path):
    """All tensors of a container."""
    import pqcli
    from pqcli.core.dtypes import name_of

    found = {}
    with pqcli.open(path) as container:
        for info in container.infos:
            array = container.numpy(info.name)
            data = array.reshape(-1).view("uint8").tobytes()
            digest = hashlib.sha256(data).hexdigest()
            found[info.name] = {"dtype": name_of(array.dtype), "shape": [*array.shape], "sha256": digest}
    return found


def ended(*arguments):
    """The exit code and the messages of a command."""
    from pqcli.cli.commands import app

    messages = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(messages):
        try:
            app([*map(str, arguments)])
        except SystemExit as end:
            return [end.code, messages.getvalue()]
    return [0, messages.getvalue()]


def main(blocked, folder, *containers):
    """Ask all that can be asked."""
    sys.meta_path.insert(0, Blocked(blocked))
    import pqcli

    found = {}
    first, others = containers[: containers.index("--")], containers[containers.index("--") + 1 :]
    for container in (*first, *others):
        findings = [str(finding) for finding in pqcli.verify(container)]
        found[container] = {"tensors": told(container), "findings": findings}
    for number, container in enumerate(first):
        place = Path(container)
        output = Path(folder) / (f"{number}" if place.is_dir() else f"{number}.safetensors")
        half = Path(folder) / f"{number}.half.safetensors"
        found[container] |= {
            "decode": ended("decode", place, "-o", output),
            "half": ended("decode", place, "-o", half, "--dtype", "float16"),
            "verify": ended("verify", place),
            "inspect": ended("inspect", place, "--json"),
        }
    found["pt"] = ended("decode", first[0], "-o", Path(folder) / "model.pt")
    found["compress"] = ended(
        "compress", next(Path(folder).glob("*.safetensors")), "-o", Path(folder) / "x.safetensors"
    )
    found["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
