"""`weightstream publish` and `verify`: say what a model is, and see whether it still is that."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli
from weightstream.cli.models import open_store
from weightstream.cli.progress import Meter
from weightstream.errors import IntegrityError, StoreError

if TYPE_CHECKING:
    from weightstream.cachefs.store import Store
    from weightstream.p2p.manifest import PublishReport, VerifyReport

Uri = Annotated[str, typer.Argument(metavar="URI", help="The folder of a model.")]


def publish(
    cli: Cli,
    uri: Uri,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Write into this folder, not into .weightstream/ beside the model."
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Sign with this Ed25519 private key (PEM)."),
    ] = None,
) -> None:
    """Write a model's chunk hashes, and a torrent, beside it: peers check bytes by them."""
    from weightstream.p2p.manifest import publish as write

    with Meter(cli, _name(uri)) as meter:
        report = write(uri, cli.settings, to, key, meter.update, store=_store(cli))
    cli.emit(report, *_published(report))


def verify(
    cli: Cli,
    uri: Uri,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare with this manifest, not with the model's own."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask for a signature by this Ed25519 public key (PEM); as manifest_key_file does.",
        ),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Check what the store has, not the origin.")
    ] = False,
) -> int:
    """Read a model again and compare it with what was published; exit code 5 if it differs."""
    from weightstream.p2p.manifest import verify as compare
    from weightstream.p2p.manifest.known import manifest_key

    key = key or manifest_key(cli.settings)
    with Meter(cli, _name(uri)) as meter:
        report = compare(uri, cli.settings, manifest, key, local, meter.update)
    cli.emit(report, *_verified(report))
    return 0 if report.ok else IntegrityError.exit_code


def _store(cli: Cli) -> "Store | None":
    """Open the store, from where chunks may come; nothing when it cannot be used."""
    try:
        return open_store(cli)
    except StoreError as error:
        cli.note(f"the store is left out: {error}")
        return None


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1].partition("?")[0]


def _published(report: "PublishReport") -> list[str]:
    text = f"{report.uri}: {report.files} files, {_pace(report.bytes_total, report.elapsed_s)}"
    lines = [text, f"  {report.manifest}", f"  {report.torrent}"]
    if report.web_seed is not None:
        lines.append(f"  web seed {report.web_seed}")
    return [*lines, f"  root hash {report.root}{', signed' if report.signed else ''}"]


def _verified(report: "VerifyReport") -> list[str]:
    from weightstream.settings import format_bytes

    pace = _pace(report.bytes_checked, report.elapsed_s)
    lines = [f"{report.uri}: {report.files} files published, checked {pace}"]
    if report.bytes_absent:
        lines.append(f"  not in the store: {format_bytes(report.bytes_absent)}")
    lines += [f"  missing: {path}" for path in report.missing]
    lines += [f"  not published: {path}" for path in report.extra]
    lines += [f"  of another size: {path}" for path in report.resized]
    for bad in report.wrong:
        lines.append(f"  wrong: {bad.path}: chunk {bad.chunk}, bytes {bad.start}-{bad.stop - 1}")
    if report.restamped:
        lines += [f"  of another version: {path}" for path in report.restamped]
        lines.append("  publish again: hashes are believed for the version they were taken of only")
    signed = f", signed by {report.signed_by}" if report.signed_by else ""
    verdict = "as published" if report.ok else "NOT as published"
    return [*lines, f"  {verdict}: root hash {report.root}{signed}"]


def _pace(count: int, seconds: float) -> str:
    from weightstream.settings import format_bytes

    rate = format_bytes(int(count / max(seconds, 1e-9)))
    return f"{format_bytes(count)} in {seconds:.1f} s, {rate}/s"
