"""Peers as a source of chunks: manifest, membership, exchange and swarm."""
