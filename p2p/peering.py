"""A node's peers, put together of the settings: identity, exchange, swarm, members."""

from collections.abc import Callable

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch import Engine
from weightstream.cachefs.origin import Origin
from weightstream.cachefs.store import Store
from weightstream.p2p.exchange import Exchange
from weightstream.p2p.identity import open_identity
from weightstream.p2p.manifest.known import Manifests
from weightstream.p2p.members import open_membership
from weightstream.p2p.swarm import open_swarm
from weightstream.settings import Settings


def open_peering(
    settings: Settings,
    store: Store | None,
    engine: Engine,
    sources: Callable[[Blob], Origin | None],
) -> Exchange:
    """Return the exchange of this node, serving; `sources` says what it may read for others.

    Raises `UsageError` for settings that cannot be, `WeightstreamError` when the port is taken.
    """
    identity = open_identity(settings)
    carrier = open_swarm(settings, identity)
    try:
        exchange = Exchange(
            settings,
            identity,
            store,
            engine.slabs,
            engine.budget.limit_bytes,
            sources,
            Manifests(settings, origin_of=sources).digest,
            carrier,
        )
    except BaseException:
        if carrier is not None:
            carrier.close()
        raise
    try:
        exchange.attach(open_membership(settings, identity, exchange.port))
    except BaseException:
        exchange.close()
        raise
    return exchange
