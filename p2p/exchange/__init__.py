"""Chunks between the nodes of a cluster, over HTTP; see docs/design/0005-peers.md."""

from weightstream.p2p.exchange.exchange import Exchange

__all__ = ["Exchange"]
