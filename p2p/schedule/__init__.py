"""Who reads what from whom: pure functions, driven by the exchange and by the simulator."""

from weightstream.p2p.schedule.homes import Homes, late_start, standing
from weightstream.p2p.schedule.pace import Pace, is_slow
from weightstream.p2p.schedule.routes import ORIGIN, Route, View, acting_home, route
from weightstream.p2p.schedule.scatter import BLOCK_BYTES, LEAST_RECEIVERS, block_giver, scattered
from weightstream.p2p.schedule.taking import givers
from weightstream.p2p.schedule.trees import ancestors, parent

__all__ = [
    "BLOCK_BYTES",
    "LEAST_RECEIVERS",
    "ORIGIN",
    "Homes",
    "Pace",
    "Route",
    "View",
    "acting_home",
    "ancestors",
    "block_giver",
    "givers",
    "is_slow",
    "late_start",
    "parent",
    "route",
    "scattered",
    "standing",
]
