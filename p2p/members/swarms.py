"""A BitTorrent HTTP tracker's state and words (BEP 3, compact answers of BEP 7 and 23). Pure.

Bounded in torrents and in peers of each; what was announced longest ago goes first.
"""

import ipaddress
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

INTERVAL_S = 60
PEER_TTL_S = 900.0
"""libtorrent asks no sooner than five minutes after the last time, whatever it is told."""

_MOST_TORRENTS = 4096
_MOST_PEERS = 2000
_MOST_WANTED = 200
_USUALLY_WANTED = 50
_HASH_BYTES = 20
_MOST_FIELDS = 64

Bencoded: TypeAlias = "bytes | int | list[Bencoded] | Mapping[bytes, Bencoded]"
Fields: TypeAlias = "dict[str, list[bytes]]"
IP: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"


class AnnounceError(ValueError):
    """A request that no client would send; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Announce:
    """One announce."""

    info_hash: bytes
    peer_id: bytes
    ip: IP
    port: int
    is_seed: bool
    stops: bool
    wanted: int
    is_compact: bool


@dataclass(frozen=True, slots=True)
class _Peer:
    ip: IP
    port: int
    is_seed: bool
    until_s: float


@dataclass(slots=True)
class Swarms:
    """Who takes part in which torrent."""

    most_torrents: int = _MOST_TORRENTS
    most_peers: int = _MOST_PEERS
    _peers: "OrderedDict[bytes, OrderedDict[bytes, _Peer]]" = field(default_factory=OrderedDict)

    def announce(self, said: Announce, now_s: float) -> Mapping[bytes, Bencoded]:
        """Note a peer and return others of its torrent, seeds not to seeds."""
        peers = self._peers.setdefault(said.info_hash, OrderedDict())
        self._peers.move_to_end(said.info_hash)
        while len(self._peers) > self.most_torrents:
            self._peers.popitem(last=False)
        peers.pop(said.peer_id, None)
        if not said.stops:
            peers[said.peer_id] = _Peer(said.ip, said.port, said.is_seed, now_s + PEER_TTL_S)
            while len(peers) > self.most_peers:
                peers.popitem(last=False)
        others = {
            peer_id: peer
            for peer_id, peer in peers.items()
            if peer_id != said.peer_id and not (peer.is_seed and said.is_seed)
        }
        chosen = random.sample(sorted(others), 0 if said.stops else min(said.wanted, len(others)))
        if not peers:
            del self._peers[said.info_hash]
        found = [(peer_id, others[peer_id]) for peer_id in chosen]
        return _counts(peers) | {b"interval": INTERVAL_S} | _listed(found, said.is_compact)

    def scrape(self, hashes: list[bytes]) -> Mapping[bytes, Bencoded]:
        """Return how many take part in each torrent."""
        known = {h: self._peers.get(h, OrderedDict()) for h in hashes[:_MOST_FIELDS]}
        return {b"files": {h: _counts(p) | {b"downloaded": 0} for h, p in known.items()}}

    def expire(self, now_s: float) -> None:
        """Forget who was silent for too long."""
        for info_hash, peers in list(self._peers.items()):
            while peers and next(iter(peers.values())).until_s <= now_s:
                peers.popitem(last=False)
            if not peers:
                del self._peers[info_hash]


def _counts(peers: Mapping[bytes, _Peer]) -> dict[bytes, Bencoded]:
    seeds = sum(peer.is_seed for peer in peers.values())
    return {b"complete": seeds, b"incomplete": len(peers) - seeds}


def _listed(found: list[tuple[bytes, _Peer]], is_compact: bool) -> dict[bytes, Bencoded]:
    if not is_compact:
        return {
            b"peers": [
                {b"peer id": peer_id, b"ip": str(peer.ip).encode(), b"port": peer.port}
                for peer_id, peer in found
            ]
        }
    packed = {4: b"", 6: b""}
    for _, peer in found:
        packed[peer.ip.version] += peer.ip.packed + peer.port.to_bytes(2, "big")
    listed: dict[bytes, Bencoded] = {b"peers": packed[4]}
    if packed[6]:
        listed[b"peers6"] = packed[6]
    return listed


def parse_query(query: str) -> Fields:
    """Return the fields of a query; their values are bytes, for hashes are no text."""
    fields: Fields = {}
    parts = query.split("&") if query else []
    if len(parts) > _MOST_FIELDS:
        raise AnnounceError("too many fields")
    for part in parts:
        name, _, value = part.partition("=")
        fields.setdefault(name, []).append(unquote_to_bytes(value.replace("+", " ")))
    return fields


def parse_hashes(fields: Fields) -> list[bytes]:
    """Return the torrents that a request names; raises `AnnounceError`."""
    hashes = fields.get("info_hash", [])
    if not hashes or any(len(info_hash) != _HASH_BYTES for info_hash in hashes):
        raise AnnounceError("info_hash is 20 bytes")
    return hashes


def parse_announce(fields: Fields, sender: str, trusts_ip: bool) -> Announce:
    """Return what is announced; raises `AnnounceError`.

    The peer is where the request comes from; with `trusts_ip` it may name another address.
    """
    peer_id = _last(fields, "peer_id")
    if len(peer_id) != _HASH_BYTES:
        raise AnnounceError("peer_id is 20 bytes")
    port = _number(fields, "port", 0)
    if not 0 < port < 1 << 16:
        raise AnnounceError("port is a number from 1 to 65535")
    named = _last(fields, "ip").decode("ascii", "replace") if trusts_ip else ""
    return Announce(
        info_hash=parse_hashes(fields)[-1],
        peer_id=peer_id,
        ip=_ip(named or sender),
        port=port,
        is_seed=_number(fields, "left", 1) == 0,
        stops=_last(fields, "event") == b"stopped",
        wanted=min(_number(fields, "numwant", _USUALLY_WANTED), _MOST_WANTED),
        is_compact=_number(fields, "compact", 1) != 0,
    )


def _last(fields: Fields, name: str) -> bytes:
    return fields.get(name, [b""])[-1]


def _number(fields: Fields, name: str, default: int) -> int:
    text = _last(fields, name)
    if not text:
        return default
    if text == b"-1":  # "as many as you like"
        return default
    if not text.isdigit() or len(text) > 20:
        raise AnnounceError(f"{name} is a number")
    return int(text)


def _ip(text: str) -> IP:
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise AnnounceError("ip is an IP address") from error
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped or found


def bencode(value: Bencoded) -> bytes:
    """Return BitTorrent's encoding of a value."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, list):
        return b"l" + b"".join(map(bencode, value)) + b"e"
    if isinstance(value, Mapping):
        pairs = sorted(value.items(), key=lambda pair: pair[0])
        return b"d" + b"".join(bencode(key) + bencode(item) for key, item in pairs) + b"e"
    return b"%d:%s" % (len(value), value)
