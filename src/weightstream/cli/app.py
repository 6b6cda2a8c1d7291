"""The command tree: which commands there are, in which groups."""

from typing import Annotated

import typer

from weightstream.cli import (
    agents,
    config,
    doctor,
    filling,
    loading,
    models,
    mounting,
    publishing,
    serve,
    tracking,
)
from weightstream.cli.base import command

LOADING = "Models"
MOUNTS = "Mounts"
PEERS = "Peers"
SERVE = "Ray Serve"
STORE = "Store"
MACHINE = "This machine"
PROOF = "See for yourself"

app = typer.Typer(
    name="weightstream",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 2 usage, 3 origin, 4 format, 5 integrity, 6 store, 7 mount, 8 cluster, "
        "130 cancelled."
    ),
)


def _version(asked: bool) -> None:
    if asked:
        from weightstream import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Stream model weights from object storage; start replicas before the last byte lands."""


command(app, LOADING)(loading.load)
command(app, LOADING)(filling.prefetch)
command(app, LOADING)(models.ls)
command(app, MOUNTS)(mounting.mount)
command(app, MOUNTS)(mounting.umount)
command(app, MOUNTS)(mounting.mounts)
command(app, MOUNTS)(mounting.refresh)
command(app, PEERS)(publishing.publish)
command(app, PEERS)(publishing.verify)
command(app, PEERS)(agents.agent)
command(app, PEERS)(tracking.tracker)
command(app, STORE)(models.status)
command(app, STORE)(models.pin)
command(app, STORE)(models.unpin)
command(app, STORE)(models.evict)
command(app, STORE)(filling.scrub)
command(app, MACHINE)(doctor.doctor)
command(app, MACHINE)(config.config)
app.add_typer(serve.app, name="serve", rich_help_panel=SERVE)


# These two have flags and help of their own.
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command(rich_help_panel=PROOF, context_settings=_PASSED_ON, add_help_option=False)
def demo(context: typer.Context) -> int:
    """Run the main job on a real model against a real S3 server on this machine."""
    from weightstream.demo.__main__ import main

    return main(context.args)


@app.command(rich_help_panel=PROOF, context_settings=_PASSED_ON, add_help_option=False)
def bench(context: typer.Context) -> int:
    """Measure weightstream beside its peers."""
    from weightstream.bench.__main__ import main

    return main(context.args)
