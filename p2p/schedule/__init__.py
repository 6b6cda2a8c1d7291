"""Who reads what from whom: pure functions, driven by the exchange and by the simulator."""

from weightstream.p2p.schedule.homes import Homes, standing
from weightstream.p2p.schedule.pace import Pace, is_slow
from weightstream.p2p.schedule.routes import ORIGIN, Route, View, route

__all__ = ["ORIGIN", "Homes", "Pace", "Route", "View", "is_slow", "route", "standing"]
