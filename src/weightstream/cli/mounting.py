"""`weightstream mount`, `umount`, `mounts`, `refresh`: a bucket as a directory."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightstream.cli.base import Cli, table
from weightstream.errors import MountError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.cachefs.fuse.mounts import RunDirectory
    from weightstream.cachefs.fuse.supervisor.handover import Job
    from weightstream.cachefs.fuse.supervisor.overview import MountRow
    from weightstream.settings import Settings

# A refresh lists every folder that was known again.
_REFRESH_S = 900.0
# The new version starts, and the old one stops.
_UPGRADE_S = 180.0


class DriverChoice(Enum):
    """Values of --driver."""

    AUTO = "auto"
    KERNEL = "kernel"
    FUSE_PYTHON = "fuse-python"


@dataclass(frozen=True, slots=True)
class UnmountReport:
    """What was unmounted."""

    directory: str


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What was listed again."""

    directory: str
    path: str
    folders: int


def mounted_directories(incomplete: str) -> list[str]:
    """Complete a directory from those that are mounted."""
    from weightstream.settings import load_settings

    records = _run_directory(load_settings()).records()
    return [one.directory for one in records if one.directory.startswith(incomplete)]


# A directory is a `str` and not a `Path`: for that typer calls stat(2), which a mount whose server
# hangs does not answer.
MountedDirectory = Annotated[
    str,
    typer.Argument(
        metavar="DIRECTORY", help="Where it is mounted.", autocompletion=mounted_directories
    ),
]


def mount(
    cli: Cli,
    origin: Annotated[
        str, typer.Argument(metavar="ORIGIN", help="s3://bucket, s3://bucket/prefix, ...")
    ],
    directory: Annotated[
        str | None,
        typer.Argument(metavar="DIRECTORY", help="An existing directory.", show_default=False),
    ] = None,
    driver: Annotated[
        DriverChoice | None,
        typer.Option(help="auto takes the better one that works here.", show_default=False),
    ] = None,
    allow_other: Annotated[
        bool,
        typer.Option("--allow-other", help="Let other users read it, too, root included."),
    ] = False,
    foreground: Annotated[
        bool,
        typer.Option("--foreground", "-f", help="Stay until it is unmounted; log to stderr."),
    ] = False,
    upgrade: Annotated[
        bool,
        typer.Option(
            "--upgrade",
            help="weightstream mount --upgrade DIRECTORY: let this version serve a mount that is "
            "there, while it is in use.",
        ),
    ] = False,
) -> None:
    """Mount an origin as a directory of files; return when it works."""
    if upgrade:
        _upgrade(cli, directory or origin)
        return
    if directory is None:
        raise UsageError("Missing argument 'DIRECTORY'.")
    settings = cli.settings_with({} if driver is None else {"driver": driver.value})
    job = job_of(settings, origin, directory, allow_other, foreground)
    from weightstream.cachefs.fuse.supervisor import launching

    if foreground:
        sys.stdout.flush()
        launching.run_in_place(job)
    report = launching.start(job)
    cli.emit(report, _mounted(report))


def job_of(
    settings: "Settings",
    origin: str,
    directory: str,
    allow_other: bool,
    foreground: bool = False,
) -> "Job":
    """Return what a supervisor is to do, once all that can be checked here is."""
    from weightstream.cachefs.fuse.mounts import MountSpec
    from weightstream.cachefs.fuse.supervisor.handover import Job
    from weightstream.cachefs.fuse.supervisor.launching import prepare_log
    from weightstream.cachefs.fuse.supervisor.server_process import Limits
    from weightstream.cachefs.fuse.supervisor.starting import choose_driver, free_directory
    from weightstream.log import mask_secrets

    uri = _absolute(origin)
    source = mask_secrets(uri)
    run = _run_directory(settings)
    driver = choose_driver(settings.driver)
    run.prepare()
    where = free_directory(run, directory, source)
    return Job(
        spec=MountSpec(uri, where, driver, settings.model_dump(mode="json"), allow_other),
        run=str(run.path),
        source=source,
        log="" if foreground else str(prepare_log(where)),
        limits=Limits(prepare_s=settings.deadline_s + 30),
    )


def _absolute(origin: str) -> str:
    """Return the URI; a path on this machine absolute, for the server has another directory."""
    return origin if "://" in origin else os.path.abspath(os.path.expanduser(origin))


def _run_directory(settings: "Settings") -> "RunDirectory":
    from weightstream.cachefs.fuse.mounts import RunDirectory

    return RunDirectory(settings.run_directory)


def _mounted(report: dict[str, Any]) -> str:
    processes = f"{report['driver']} driver, process {report['supervisor_pid']}"
    return f"{report['uri']} is mounted at {report['directory']} ({processes})"


def _upgrade(cli: Cli, directory: str) -> None:
    from weightstream.cachefs.fuse.mount_table import canonical

    path = canonical(directory)
    answer = _ask(
        cli, path, {"command": "upgrade", "python": sys.executable}, _UPGRADE_S, "upgraded"
    )
    cli.emit(answer, f"{path} is served by version {answer['version']}, process "
             f"{answer['server_pid']}")  # fmt: skip


def _ask(
    cli: Cli, directory: str, question: dict[str, Any], limit_s: float, wanted: str
) -> dict[str, Any]:
    """Ask a mount's supervisor; say what to do when there is none."""
    run = _run_directory(cli.settings)
    record = run.record(directory)
    if record is None:
        raise MountError(f"{directory} is not mounted by weightstream")
    try:
        return run.ask(directory, question, limit_s)
    except TimeoutError as error:
        raise MountError(f"the mount of {directory} does not answer") from error
    except ConnectionError as error:
        again = f"weightstream mount {record.uri} {directory}"
        cause = f"{directory} cannot be {wanted}: its supervisor has ended"
        raise MountError(f"{cause} (take it over: {again})") from error


def umount(
    cli: Cli,
    directory: MountedDirectory,
    lazy: Annotated[
        bool,
        typer.Option("--lazy", "-l", help="Though it is in use: serve those who have files open."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Though it is in use: readers get an error."),
    ] = False,
) -> None:
    """Unmount a directory; say who uses it when it is in use."""
    from weightstream.cachefs.fuse.supervisor.unmounting import unmount

    path = unmount(_run_directory(cli.settings), directory, lazy, force)
    cli.emit(UnmountReport(path), f"{path} is unmounted")


def mounts(cli: Cli) -> None:
    """List what is mounted, by whom it is served, and how it is."""
    from weightstream.cachefs.fuse.supervisor.overview import overview

    rows = overview(_run_directory(cli.settings))
    cli.emit(rows, _mounts_table(rows) if rows else "nothing is mounted")


def _mounts_table(rows: "Iterable[MountRow]") -> "RenderableType":
    cells = (
        (
            row.directory,
            row.uri,
            row.driver,
            row.state,
            ", ".join(str(pid) for pid in (row.supervisor_pid, row.server_pid) if pid),
            _duration(row.uptime_s),
            str(row.restarts),
            row.log,
        )
        for row in rows
    )
    headers = ("DIRECTORY", "ORIGIN", "DRIVER", "STATE", "PROCESSES", "UP", "RESTARTS", "LOG")
    return table(headers, cells, right="UP RESTARTS")


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(seconds)} s"


def refresh(
    cli: Cli,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A mount, or a folder in one.")],
) -> None:
    """Look at the origin again now, and not when the listings of a mount are old enough."""
    from weightstream.cachefs.fuse.mount_table import mount_of

    found = mount_of(path)
    if found is None:
        raise MountError(f"{path} is not in a mount of weightstream")
    inside = _inside(path, found.directory)
    question = {"command": "refresh", "path": inside}
    answer = _ask(cli, found.directory, question, _REFRESH_S, "refreshed")
    report = RefreshReport(found.directory, inside, int(answer.get("folders", 0)))
    cli.emit(report, f"{found.directory}/{inside}: {report.folders} folders listed again")


def _inside(path: str, directory: str) -> str:
    """Return a path relative to the mount that holds it; "" for the mount itself."""
    from weightstream.cachefs.fuse.mount_table import is_under

    absolute = os.path.abspath(path)
    if not is_under(absolute, directory):
        absolute = os.path.realpath(path)
    return os.path.relpath(absolute, directory).removeprefix(".").lstrip("/")
