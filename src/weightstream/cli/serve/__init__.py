"""`weightstream serve ...`: what is said to a Ray cluster. One module per command or two."""

import typer

app = typer.Typer(no_args_is_help=True, help="Ray Serve: agents, scaling, standby, compaction.")

NODES = "Nodes"
SCALING = "Scaling"
COMPACTION = "Compaction"
