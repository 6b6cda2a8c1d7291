"""The main job on a real model, timed: cold, in a second process, on a second node, as usual."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from weightstream.errors import UsageError, WeightstreamError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 when every check held, else an exit code of the command line."""
    options = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    try:
        return _run(options)
    except WeightstreamError as error:
        print(f"weightstream demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("weightstream demo: interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightstream demo", description=__doc__)
    parser.add_argument("--size", default="1GiB", help="size of the generated checkpoint")
    picture = Path("weightstream-demo.png")
    parser.add_argument("--picture", type=Path, default=picture, help="where the timeline goes")
    return parser


def _run(options: argparse.Namespace) -> int:
    from weightstream.demo.run import run_demo
    from weightstream.settings import parse_bytes

    size_bytes = parse_bytes(options.size)
    if not isinstance(size_bytes, int) or size_bytes < 1 << 20:
        raise UsageError(f"--size {options.size!r}: use a size such as 1GiB")
    return run_demo(options.picture, size_bytes)


if __name__ == "__main__":
    sys.exit(main())
