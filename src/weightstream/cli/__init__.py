"""The `weightstream` command.

Results go to stdout, logs and progress to stderr, so that both can be piped. The modules that hold
commands keep their top-level imports to typer and the standard library: `weightstream --help` and
shell completion import no pydantic, no fsspec and no torch.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code. No exception leaves, so no traceback does."""
    from weightstream.cli.failures import guarded

    return guarded(list(sys.argv[1:] if arguments is None else arguments))
