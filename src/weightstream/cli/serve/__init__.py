"""`weightstream serve ...`: what is said to a Ray cluster. One module per command or two."""

import typer

from weightstream.cli.base import command
from weightstream.cli.serve import compact, nodes, simulate, standby, timeline

app = typer.Typer(no_args_is_help=True, help="Ray Serve: agents, scaling, standby, compaction.")

NODES = "Nodes"
SCALING = "Scaling"
COMPACTION = "Compaction"

command(app, NODES)(nodes.up)
command(app, NODES)(nodes.down)
command(app, NODES)(nodes.warm)
command(app, NODES)(nodes.status)
command(app, SCALING)(standby.standby)
command(app, SCALING)(simulate.simulate)
command(app, COMPACTION)(compact.compact)
command(app, NODES)(timeline.timeline)
