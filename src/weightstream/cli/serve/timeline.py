"""`weightstream serve timeline`: what the starts and loads of replicas took, phase by phase."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.serve.connecting import Address, connected

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.serve_integration.loading.noting import ReplicaLoads
    from weightstream.serve_integration.loading.phases import Phases

_SHORT = 12


def timeline(
    cli: Cli,
    address: Address = "auto",
    application: Annotated[
        str | None, typer.Option("--app", metavar="NAME", help="Only this application.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it too: .png, .svg or .pdf; needs matplotlib."),
    ] = None,
) -> None:
    """Show what the starts and loads of replicas took: when each phase ended, in seconds."""
    from weightstream.serve_integration.loading.noting import noted_loads

    with connected(address):
        found = noted_loads(application)
    if plot is not None:
        from weightstream.serve_integration.loading.picture import draw

        draw(found, plot)
    cli.emit(found, _table(found) if found else "no replica has noted a load")


def _table(found: "Sequence[ReplicaLoads]") -> "RenderableType":
    from weightstream.serve_integration.loading.phases import PHASES

    phases = tuple(phase.replace("_", "-").upper() for phase in PHASES)
    headers = ("DEPLOYMENT", "REPLICA", "NODE", "MODEL", "SIZE", "FROM", *phases)
    return table(headers, _rows(found), right=" ".join(("SIZE", *phases)))


def _rows(found: "Sequence[ReplicaLoads]") -> Iterator[tuple[str, ...]]:
    from weightstream.settings import format_bytes

    for replica in found:
        for load in replica.loads:
            yield (
                f"{replica.app}#{replica.deployment}",
                replica.replica,
                replica.node_id[:_SHORT],
                load.uri,
                format_bytes(load.bytes_total),
                load.warmth if load.is_start else f"{load.warmth}, later",
                *_ends(load),
            )


def _ends(load: "Phases") -> Iterator[str]:
    from weightstream.serve_integration.loading.phases import PHASES

    ends = load.ends()
    return (f"{ends[phase]:.2f}" if phase in ends else "" for phase in PHASES)
