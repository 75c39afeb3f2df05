"""`python -m pqcli`, and the entry point of the `pqcli` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; `--version` is answered before anything else is imported."""
    if sys.argv[1:] == ["--version"]:
        from pqcli.version import __version__

        sys.stdout.write(f"pqcli {__version__}\n")
        return
    from pqcli.cli import app

    try:
        app()
    except OSError as error:  # from printing help: the commands themselves let none out
        sys.stderr.write(f"error: {error.strerror or error}\n")
        sys.stdout = None  # nothing is left to flush
        sys.exit(1)


if __name__ == "__main__":
    main()
