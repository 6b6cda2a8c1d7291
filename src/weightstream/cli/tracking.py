"""`weightstream tracker`: tells agents of each other."""

import signal
import threading
from typing import Annotated

import typer

from weightstream.cli.base import Cli
from weightstream.errors import UsageError


def tracker(
    cli: Cli,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where members and BitTorrent peers ask.")
    ] = "0.0.0.0:7472",
) -> None:
    """Tell the members of a cluster of each other, BitTorrent peers too; until SIGTERM."""
    from weightstream.p2p.identity import read_keys
    from weightstream.p2p.members.tracker import Tracker

    host, port = _address(listen)
    keys = read_keys(cli.settings)
    if keys is None:
        cli.note("no cluster_secret_file: whoever reaches this port can list and announce")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Tracker(host, port, keys) as running:
        shown = f"[{host}]" if ":" in host else host
        cli.note(f"the tracker listens at {shown}:{running.port}")
        ended.wait()


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise UsageError(f"bad --listen {text!r}: it is HOST:PORT, 0.0.0.0:7472")
    return host.strip("[]"), int(port)
