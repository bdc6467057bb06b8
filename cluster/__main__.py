"""The way into the ``datamix`` command, for installations that lack what it is made of too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run :func:`cluster.cli.main`, or say which extra brings the command line."""
    try:
        from cluster.cli import main as run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(
            "datamix: this command needs typer, which is not installed; "
            "install datamix-cluster[cli]",
            file=sys.stderr,
        )
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
