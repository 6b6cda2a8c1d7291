"""The swarm: bulk between nodes over BitTorrent (libtorrent), in a process of its own.

Swarm (a Carrier)  one per agent: members, hashes, blame
  └ Cargo          one per blob: which chunks are here, who waits for one
  └ Keeper         the process: starts it, starts it again, speaks to it
      └ process    libtorrent: knows torrents and pieces, nothing of ours
"""

from weightstream.p2p.swarm.swarm import Swarm, open_swarm

__all__ = ["Swarm", "open_swarm"]
