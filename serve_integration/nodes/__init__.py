"""One agent per node of a Ray cluster, and what they are asked for: to hold weights beforehand.

    up, down, ensure, watch   agents come and go                      cluster.py, on_node.py
    warm, prewarm             nodes bring a model into their stores   warming.py, prewarming.py
    held, cluster_status      what each node holds                    holding.py, overview.py
    listing_of_peers          which files a model has                 listings.py

An agent is no Ray actor: a long-lived actor, with zero CPUs too, keeps its node from ever being
idle, and so from being given back. It is a process that a short task forks twice.

Who may read what: the cluster's secret and the agents' tokens stand in Ray's key-value store, where
whoever reaches the cluster can read them. Whoever reaches it can also run code on every node as
the user that the agents run as, and read the same from their files; so nothing is given away that
was not given with the cluster. They never stand in an argument list, an environment or a log; on
the nodes, in files of mode 0600. Where that is not enough (a key-value store that Redis keeps on
disk, a network without Ray's TLS), start agents by systemd or as a DaemonSet: `up` finds them.
"""

from weightstream.serve_integration.nodes.cluster import down, ensure, up, watch
from weightstream.serve_integration.nodes.holding import held
from weightstream.serve_integration.nodes.on_node import NodeReport
from weightstream.serve_integration.nodes.overview import cluster_status
from weightstream.serve_integration.nodes.picking import NodeRoom, pick_nodes
from weightstream.serve_integration.nodes.prewarming import prewarm
from weightstream.serve_integration.nodes.warming import NodeProgress, Warming, warm

__all__ = [
    "NodeProgress",
    "NodeReport",
    "NodeRoom",
    "Warming",
    "cluster_status",
    "down",
    "ensure",
    "held",
    "pick_nodes",
    "prewarm",
    "up",
    "warm",
    "watch",
]
