"""Which files a model has, as another node's store remembers it: for one that reaches no origin."""

import ray

from weightstream.cachefs.store import Store
from weightstream.cachefs.store.listing import StoredListing
from weightstream.serve_integration.nodes.holding import held
from weightstream.serve_integration.nodes.orders import noted_orders
from weightstream.serve_integration.nodes.tasks import on_nodes
from weightstream.settings import load_settings

_MOST_ASKED = 3
_LIMIT_S = 30.0  # a worker has to start there


def listing_of_peers(root: str) -> StoredListing | None:
    """Return the newest listing of those other nodes that hold most of a model, or None.

    A version of it may have been replaced in the origin since; nobody can tell while that is away.
    """
    mine = ray.get_runtime_context().get_node_id()
    holders = [(count, node_id) for node_id, count in held(root).items() if count]
    asked = [node_id for _, node_id in sorted(holders, reverse=True) if node_id != mine]
    given = [(node_id, (root,)) for node_id in asked[:_MOST_ASKED]]
    found = [one.result for one in on_nodes(_stored, given, _LIMIT_S) if one.result is not None]
    return max(found, key=lambda one: one.fetched_at_s, default=None)


def _stored(root: str) -> StoredListing | None:
    """Read the store of this node, where its agent keeps it."""
    orders = noted_orders()
    settings = load_settings(dict(orders.settings) if orders is not None else None)
    with Store.open(settings) as store:
        return store.load_listing(root)
