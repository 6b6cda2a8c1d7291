"""`weightstream agent`: the one long-running process of a node."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli
from weightstream.errors import UsageError

if TYPE_CHECKING:
    from weightstream.cachefs.agent.origins import Origins
    from weightstream.cachefs.agent.peering import Peering
    from weightstream.cachefs.fetch import Engine
    from weightstream.cachefs.store import Store
    from weightstream.settings import Settings


_LEAST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class _Mount:
    origin: str
    directory: str


def agent(
    cli: Cli,
    mount: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN:DIRECTORY", help="Mount this; the mount outlives the agent."),
    ] = None,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users read the mounts, root included.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Read this origin for peers, too."),
    ] = None,
    api: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve the control API over TCP, too."),
    ] = None,
    api_token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The token that the TCP API asks for.")
    ] = None,
) -> int:
    """Run this node's agent: fetch for everybody on it, mount, talk to peers; until SIGTERM."""
    from weightstream.cachefs.agent.running import Orders, run

    settings = cli.settings
    mounts = [_mount(text) for text in mount or ()]
    orders = Orders(
        roots=(*(one.origin for one in mounts if _is_remote(one.origin)), *(allow or ())),
        directories=tuple(one.directory for one in mounts),
        api=_address(api) if api else None,
        token=_token(api_token_file) if api_token_file else "",
    )
    if orders.api is not None and not orders.token:
        raise UsageError("--api needs --api-token-file: whoever reaches the port could ask")

    def mount_all() -> None:
        for one in mounts:
            _mount_if_missing(settings, one, allow_other)

    code = run(settings, orders, peering_of, mount_all, cli.note)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no thread that waits for a hung origin or disk may hold the end up


def peering_of(
    settings: "Settings", store: "Store", engine: "Engine", origins: "Origins"
) -> "Peering | None":
    """Return this node's peers; None when the settings name none."""
    if not settings.peers:
        return None
    from weightstream.p2p.peering import open_peering

    return open_peering(settings, store, engine, origins.source_for)


def _mount(text: str) -> _Mount:
    origin, separator, directory = text.rpartition(":")
    if not separator or not origin or not directory or directory.startswith("//"):
        raise UsageError(f"bad --mount {text!r}: it is ORIGIN:DIRECTORY, s3://models:/mnt/models")
    return _Mount(origin, directory)


def _is_remote(origin: str) -> bool:
    return "://" in origin and not origin.startswith("file://")


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise UsageError(f"bad --api {text!r}: it is HOST:PORT, 127.0.0.1:7471")
    return host.strip("[]"), int(port)


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --api-token-file {path}: {error}") from error
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UsageError(f"{path} holds no token: {_LEAST_TOKEN} ASCII characters or more, a line")
    return token


def _mount_if_missing(settings: "Settings", one: _Mount, allow_other: bool) -> None:
    """Mount; a mount that an agent before this one made is kept."""
    from weightstream.cachefs.fuse.mount_table import canonical
    from weightstream.cachefs.fuse.mounts import RunDirectory
    from weightstream.cachefs.fuse.supervisor import launching
    from weightstream.cli.mounting import job_of
    from weightstream.log import mask_secrets

    run = RunDirectory(settings.run_directory)
    path = canonical(one.directory)
    record = run.record(path)
    same = record is not None and record.uri == mask_secrets(one.origin)
    if not (same and run.is_supervised(path)):
        launching.start(job_of(settings, one.origin, one.directory, allow_other))
