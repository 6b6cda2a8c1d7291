"""`weightstream serve simulate`: what a trace would come to under several scaling policies."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.serve_integration.scaling.policy import Policy
    from weightstream.serve_integration.scaling.simulate.scalers import Scaler
    from weightstream.serve_integration.scaling.simulate.table import Outcome
    from weightstream.serve_integration.scaling.simulate.traces import Trace
    from weightstream.serve_integration.scaling.simulate.world import Run, Service

POLICY = "Policy"
SERVICE = "Deployment"


class Name(Enum):
    """A policy that can be replayed."""

    WEIGHTSTREAM = "weightstream"
    RAY = "ray"
    UTILISATION = "utilisation"


def simulate(
    cli: Cli,
    trace: Annotated[
        str,
        typer.Argument(
            help="A CSV or JSONL file (time, duration[, tokens]), or made up: burst, ramp, daily, "
            "poisson, each with settings as in poisson:rate=5,over=600,seconds=2."
        ),
    ],
    policy: Annotated[
        list[Name] | None, typer.Option(help="Only this one; may be repeated.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a picture: .png, .svg or .pdf.", show_default=False)
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the trace as CSV or .jsonl and do no more.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="For what is made up.")] = 0,
    target: Annotated[
        float, typer.Option(help="Requests per replica.", rich_help_panel=POLICY)
    ] = 2,
    least: Annotated[
        int, typer.Option("--min", help="Fewest replicas.", rich_help_panel=POLICY)
    ] = 0,
    most: Annotated[int, typer.Option("--max", help="Most replicas.", rich_help_panel=POLICY)] = 50,
    step: Annotated[int, typer.Option(help="Scaling step.", rich_help_panel=POLICY)] = 1,
    headroom: Annotated[
        int, typer.Option(help="Extra steps while there is traffic.", rich_help_panel=POLICY)
    ] = 0,
    down_after: Annotated[
        float, typer.Option(help="Seconds a size holds.", rich_help_panel=POLICY)
    ] = 60,
    idle_after: Annotated[
        float, typer.Option(help="Seconds until zero.", rich_help_panel=POLICY)
    ] = 300,
    calm: Annotated[
        float,
        typer.Option(help="Seconds that growth waits without a queue.", rich_help_panel=POLICY),
    ] = 10,
    growth: Annotated[
        float | None,
        typer.Option(help="At most so many times.", rich_help_panel=POLICY, show_default=False),
    ] = None,
    trend: Annotated[
        float, typer.Option(help="Seconds in which to look for a rise.", rich_help_panel=POLICY)
    ] = 30,
    target_tokens: Annotated[
        float | None,
        typer.Option(help="Tokens per replica.", rich_help_panel=POLICY, show_default=False),
    ] = None,
    at_once: Annotated[
        int, typer.Option(help="Requests that a replica takes at once.", rich_help_panel=SERVICE)
    ] = 4,
    waiting: Annotated[
        int, typer.Option(help="Requests that may wait; -1: all.", rich_help_panel=SERVICE)
    ] = -1,
    start: Annotated[
        float, typer.Option(help="Seconds that a cold start takes.", rich_help_panel=SERVICE)
    ] = 20,
    warm_start: Annotated[
        float, typer.Option(help="Where a node has the model.", rich_help_panel=SERVICE)
    ] = 5,
    tail: Annotated[
        float, typer.Option(help="Seconds to go on after the end.", rich_help_panel=SERVICE)
    ] = 900,
) -> None:
    """Replay a trace through scaling policies: replicas, latencies, refusals, replica-seconds."""
    from weightstream.serve_integration.scaling.policy import Policy
    from weightstream.serve_integration.scaling.simulate import traces
    from weightstream.serve_integration.scaling.simulate.table import outcome
    from weightstream.serve_integration.scaling.simulate.world import Service, run

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"cannot draw {plot.name!r}: it ends in .png, .svg or .pdf")
    requests = traces.load(trace, seed)
    if write is not None:
        traces.write(requests, write)
        cli.note(f"{len(requests)} requests written to {write}")
        return
    wishes = Policy(
        target=target,
        min=least,
        max=most,
        step=step,
        headroom=headroom,
        scale_down_after_s=down_after,
        idle_after_s=idle_after,
        calm_s=calm,
        growth=growth,
        trend_s=trend,
        target_tokens=target_tokens,
    )
    service = Service(at_once, start, warm_start, waiting, tail)
    runs = [run(requests, one, service) for one in _scalers(wishes, service, policy or list(Name))]
    cli.emit(outcomes := [outcome(one) for one in runs], _shown(outcomes))
    if plot is not None:
        _draw(runs, requests, wishes.target, service, trace, plot)
        cli.note(f"drawn to {plot}")


def _scalers(wishes: "Policy", service: "Service", names: list[Name]) -> "list[Scaler]":
    from weightstream.serve_integration.scaling.simulate import scalers

    made: dict[Name, Scaler] = {
        Name.WEIGHTSTREAM: scalers.Concurrency(wishes),
        Name.RAY: scalers.RayDefault(wishes.target, wishes.min, wishes.max),
        Name.UTILISATION: scalers.Utilisation(
            # At full slots a share cannot rise any more, so it has to aim lower.
            min(0.8, wishes.target / service.slots),
            service.slots,
            wishes.min,
            wishes.max,
        ),
    }
    return [made[name] for name in dict.fromkeys(names)]


def _shown(outcomes: "list[Outcome]") -> "RenderableType":
    numbers = "accepted refused unanswered p50 p95 p99 largest changes replica-seconds"
    return table(
        ("policy", *numbers.split()),
        (
            (
                one.policy,
                f"{one.accepted:,}",
                f"{one.rejected:,}",
                f"{one.unanswered:,}",
                *(f"{value:.2f} s" for value in (one.p50_s, one.p95_s, one.p99_s)),
                str(one.largest),
                str(one.changes),
                f"{one.replica_seconds:,.0f}",
            )
            for one in outcomes
        ),
        right=numbers,
    )


def _draw(
    runs: "list[Run]", requests: "Trace", target: float, service: "Service", trace: str, path: Path
) -> None:
    try:
        from weightstream.serve_integration.scaling.simulate.picture import draw
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}: pip install {error.name}") from None
    from weightstream.serve_integration.scaling.simulate.world import ideal

    title = (
        f"{trace}: {len(requests):,} requests, {target:g} per replica (at most {service.slots}), "
        f"start {service.start_s:g} s, {service.warm_start_s:g} s warm"
    )
    draw(runs, ideal(requests, target), title, path)
