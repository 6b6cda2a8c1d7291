"""Which nodes are there now: addresses from a list, a name, a file or a tracker, and heartbeats.

sources (fixed, names, file, tracked) -> heartbeat + policy -> Membership
tracker + registry + swarms: the server side of `tracker:`
"""

from weightstream.p2p.members.addresses import Address
from weightstream.p2p.members.heartbeat import Heartbeats
from weightstream.p2p.members.member import Member, Membership, StaticMembers
from weightstream.p2p.members.opening import open_membership
from weightstream.p2p.members.sources import Source, SourceError

__all__ = [
    "Address",
    "Heartbeats",
    "Member",
    "Membership",
    "Source",
    "SourceError",
    "StaticMembers",
    "open_membership",
]
