"""Reads the setting `peers`."""

from pathlib import Path

from weightstream.errors import UsageError
from weightstream.p2p.identity import Identity
from weightstream.p2p.members.addresses import parse_address, unique
from weightstream.p2p.members.heartbeat import Heartbeats
from weightstream.p2p.members.member import Membership
from weightstream.p2p.members.sources import (
    MOST_ADDRESSES,
    FileSource,
    FixedSource,
    NameSource,
    Source,
)
from weightstream.p2p.members.tracked import TrackerSource, parse_tracker
from weightstream.settings import Settings

_WHERE = "setting peers"


def open_membership(settings: Settings, identity: Identity, port: int) -> Membership:
    """Look for the members that the setting `peers` names; `port` is where this node serves.

    Raises `UsageError`, which names the setting.
    """
    return Heartbeats(identity, source_of(settings, identity, port))


def source_of(settings: Settings, identity: Identity, port: int) -> Source:
    """Return where the addresses come from."""
    kind, _, rest = settings.peers.strip().partition(":")
    if kind == "dns":
        return NameSource(parse_address(rest, f"{_WHERE}: dns:"))
    if kind == "file":
        source = FileSource(Path(rest).expanduser(), _WHERE)
        source.check()
        return source
    if kind == "tracker":
        told = settings.peer_address
        address = parse_address(told, "setting peer_address") if told else None
        return TrackerSource(parse_tracker(rest, _WHERE), identity, port, address)
    parts = [part for part in settings.peers.split(",") if part.strip()]
    if not parts or len(parts) > MOST_ADDRESSES:
        raise UsageError(f"bad {_WHERE}: it names {len(parts)} addresses")
    return FixedSource(unique(parse_address(part, _WHERE) for part in parts))
