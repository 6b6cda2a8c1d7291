"""What the agents of a cluster are started with: said once by `up`, kept for nodes that join."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from weightstream.serve_integration import registry

_KEY = "nodes/orders"


@dataclass(frozen=True, slots=True)
class Orders:
    """The same for every node; `address` is the node's own."""

    allow: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """As `-o KEY=VALUE` gives them; they win over the node's environment."""
    tracker: str = ""
    """`http://host:port`; empty where the settings name the peers."""
    secret: str = field(default="", repr=False)
    """The cluster's; empty where a setting names its file."""

    @property
    def key(self) -> str:
        """Return a name for these orders: an agent that was started with others starts anew."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def note_orders(orders: Orders | None) -> None:
    """Keep them in the registry, or none."""
    registry.note(_KEY, None if orders is None else asdict(orders))


def noted_orders() -> Orders | None:
    """Return those of the last `up`; None when there was none, or `down` came after it."""
    match registry.recall(_KEY):
        case {"allow": list(allow), "settings": dict(settings), **rest}:
            given = {name: str(rest.get(name, "")) for name in ("tracker", "secret")}
            return Orders(tuple(allow), settings, **given)
    return None
