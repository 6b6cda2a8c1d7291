"""libtorrent, as much of it as the swarm needs. Runs in the swarm's process only.

Every number in `_settings` was measured on shaped links, 8 nodes, or is there because its default
talks to strangers.
"""

import contextlib
import ipaddress
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import libtorrent as lt

from weightstream.p2p.swarm.frames import Message
from weightstream.p2p.swarm.torrent import BLOB_FILE, FIRST_PIECE, LEAST_PIECE_BYTES

_WANTED, _UNWANTED = 4, 0
_RECONNECT_S = 1.0
_RATES_S = 0.25
_ALLOW, _DENY = 0, 1
_ADDED = "0.0.0.0"
"""Whom libtorrent names as the sender of a block that came by `add_piece`."""

# RFC 7919, ffdhe2048. libtorrent asks for parameters; TLS 1.3 does not use them.
_DH = """-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


@dataclass(slots=True)
class _Torrent:
    name: str
    handle: lt.torrent_handle
    info: lt.torrent_info
    had: str
    """By piece of the blob, "1" where it was here from the beginning."""
    peers: set[tuple[str, int]] = field(default_factory=set)
    finished: list[dict[str, Any]] = field(default_factory=list)
    senders: dict[int, dict[str, list[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    whole: set[int] = field(default_factory=set)
    """Pieces that are finished, but not yet told: the last block's sender is not known."""
    adding: set[int] = field(default_factory=set)

    def n_blocks(self, piece: int) -> int:
        """Return in how many blocks a piece comes."""
        return -(-self.info.piece_size(piece) // LEAST_PIECE_BYTES)


class Session:
    """One libtorrent session; one thread. `do` what the agent says, tell it the `news`."""

    def __init__(self, start: Message, wake_fd: int) -> None:
        self._certificate: str = start["certificate"]
        self._private_key: str = start["private_key"]
        self._authority: str = start["authority"]
        self._torrents: dict[str, _Torrent] = {}
        self._by_handle: dict[lt.torrent_handle, _Torrent] = {}
        self._admitted: frozenset[str] = frozenset()
        self._failures: list[dict[str, Any]] = []
        self._is_ready = False
        self._connect_s = self._rates_s = 0.0
        params = lt.session_params()
        params.settings = _settings(start["listen"], bool(self._certificate))
        # Only with it a piece is in the file when it is said to be: with the others 7 to 31 of
        # 256 pieces were not, for up to 0.7 s.
        params.disk_io_constructor = "posix_disk_io_constructor"
        self._session = lt.session(params)
        self._session.set_alert_fd(wake_fd)
        self._admit(())

    @property
    def adding(self) -> int:
        """Return how many pieces are on their way into files."""
        return sum(len(torrent.adding) for torrent in self._torrents.values())

    def forget_adding(self) -> None:
        """Wait no longer for pieces that were added."""
        for torrent in self._torrents.values():
            torrent.adding.clear()

    # What the agent says

    def do(self, message: Message, payload: bytes) -> None:
        """Obey; what is about a torrent that is gone is nothing."""
        op = message["op"]
        if op == "add":
            try:
                self._add(message, payload)
            except (RuntimeError, ValueError) as error:  # what libtorrent says of a bad torrent
                name = message["name"]
                self._failures.append({"event": "failed", "name": name, "why": str(error)})
            return
        if op == "admit":
            self._admit(message["hosts"])
            return
        torrent = self._torrents.get(message["name"])
        if torrent is None:
            return
        if op == "piece":
            self._add_piece(torrent, FIRST_PIECE + message["piece"], payload)
        elif op == "want":
            priority = _WANTED if message["wanted"] else _UNWANTED
            pieces = [i for start, stop in message["runs"] for i in range(start, stop)]
            torrent.handle.prioritize_pieces([(FIRST_PIECE + i, priority) for i in pieces])
        elif op == "connect":
            torrent.peers.add((message["host"], message["port"]))
            self._connect_s = 0.0
        elif op == "remove":
            self._remove(torrent)

    def _add(self, message: Message, description: bytes) -> None:
        params = lt.load_torrent_buffer(description)
        if params.ti is None:
            raise ValueError("nothing is described")
        # Not in the description: each node signs the authority's certificate anew.
        params.root_certificate = self._authority
        params.save_path, path = os.path.split(message["path"])
        params.renamed_files = {BLOB_FILE: os.path.join(params.save_path, path)}
        flags = lt.torrent_flags
        params.flags &= ~flags.auto_managed & ~flags.paused
        params.flags |= flags.no_verify_files | flags.duplicate_is_error | flags.disable_dht
        params.flags |= flags.disable_lsd | flags.disable_pex
        if not message["writes"]:
            params.flags |= flags.upload_mode
        params.have_pieces = [False] * FIRST_PIECE + [mark == "1" for mark in message["have"]]
        params.verified_pieces = params.have_pieces
        params.piece_priorities = [_UNWANTED] * len(params.have_pieces)
        handle = self._session.add_torrent(params)
        if self._certificate:
            handle.set_ssl_certificate_buffer(self._certificate, self._private_key, _DH)
        torrent = _Torrent(message["name"], handle, params.ti, message["have"])
        self._torrents[torrent.name] = self._by_handle[handle] = torrent

    def _add_piece(self, torrent: _Torrent, piece: int, data: bytes) -> None:
        if not torrent.handle.have_piece(piece):
            torrent.adding.add(piece)
            torrent.handle.add_piece(piece, data, 0)

    def _remove(self, torrent: _Torrent) -> None:
        del self._torrents[torrent.name], self._by_handle[torrent.handle]
        self._session.remove_torrent(torrent.handle)

    def _admit(self, hosts: Iterable[str]) -> None:
        """Talk to these, and to nobody else: who is connected and is not among them is cut off."""
        self._admitted = frozenset(hosts)
        allowed = lt.ip_filter()
        allowed.add_rule("0.0.0.0", "255.255.255.255", _DENY)
        allowed.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", _DENY)
        for host in self._admitted:
            allowed.add_rule(host, host, _ALLOW)
        self._session.set_ip_filter(allowed)
        self._connect_s = 0.0

    # What it hears

    def news(self) -> list[dict[str, Any]]:
        """Return what happened since the last time."""
        told, self._failures = self._failures, []
        for alert in self._session.pop_alerts():
            # an alert dies at the next pop: nothing is kept
            if isinstance(alert, lt.block_finished_alert | lt.piece_finished_alert):
                self._progress(alert)
            elif isinstance(alert, lt.listen_succeeded_alert | lt.listen_failed_alert):
                told += self._listens(alert)
            elif isinstance(alert, lt.file_error_alert | lt.torrent_error_alert):
                told += self._failed(alert)
        for torrent in self._torrents.values():
            if torrent.finished:
                told.append({"event": "pieces", "name": torrent.name, "pieces": torrent.finished})
                torrent.finished = []
        return [*told, *self._tick()]

    def _progress(self, alert: lt.block_finished_alert | lt.piece_finished_alert) -> None:
        torrent = self._by_handle.get(alert.handle)
        if torrent is None:
            return
        piece = alert.piece_index
        if isinstance(alert, lt.block_finished_alert):
            torrent.senders[piece][alert.ip[0]].append(alert.block_index)
        elif torrent.had[piece - FIRST_PIECE] == "1":
            return
        else:  # without hash checks it comes before the last block's
            torrent.whole.add(piece)
        sent = torrent.senders[piece]
        if piece in torrent.whole and sum(map(len, sent.values())) == torrent.n_blocks(piece):
            torrent.whole.discard(piece)
            torrent.adding.discard(piece)
            del torrent.senders[piece]
            senders = {_plain(host): blocks for host, blocks in sent.items() if host != _ADDED}
            torrent.finished.append({"piece": piece - FIRST_PIECE, "senders": senders})

    def _listens(
        self, alert: lt.listen_succeeded_alert | lt.listen_failed_alert
    ) -> Iterable[dict[str, Any]]:
        if self._is_ready:
            return
        if isinstance(alert, lt.listen_failed_alert):
            yield {"event": "refused", "why": alert.error.message()}
        elif str(alert.socket_type) in ("tcp", "tcp_ssl"):
            self._is_ready = True
            yield {"event": "ready", "port": alert.port}

    def _failed(
        self, alert: lt.file_error_alert | lt.torrent_error_alert
    ) -> Iterable[dict[str, Any]]:
        torrent = self._by_handle.get(alert.handle)
        if torrent is not None:
            why = alert.error.message()
            self._remove(torrent)
            yield {"event": "failed", "name": torrent.name, "why": why}

    def _tick(self) -> Iterable[dict[str, Any]]:
        now_s = time.monotonic()
        if now_s >= self._connect_s + _RECONNECT_S:
            self._connect_s = now_s
            for torrent in self._torrents.values():
                self._connect(torrent)
        if now_s < self._rates_s + _RATES_S:
            return []
        self._rates_s = now_s
        return [{"event": "rates", "moved": self._moved()}]

    def _moved(self) -> dict[str, tuple[int, int]]:
        """Return the bytes that came and went, by torrent."""
        found = {}
        for torrent in self._torrents.values():
            status = torrent.handle.status()
            found[torrent.name] = status.total_payload_download, status.total_payload_upload
        return found

    def _connect(self, torrent: _Torrent) -> None:
        """Connect to whom there is no connection. Who has come by itself has another port."""
        there = Counter(_plain(peer.ip[0]) for peer in torrent.handle.get_peer_info())
        for host, port in sorted(torrent.peers):
            if host not in self._admitted:
                continue
            if there[host] > 0:
                there[host] -= 1
                continue
            with contextlib.suppress(RuntimeError):  # an address that it cannot use
                torrent.handle.connect_peer((host, port))


def _plain(host: str) -> str:
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _settings(listen: str, is_encrypted: bool) -> Any:
    host = listen.rpartition(":")[0].strip("[]")
    own = "" if ipaddress.ip_address(host).is_unspecified else host
    kinds = lt.alert_category
    mask = kinds.error | kinds.status | kinds.storage | kinds.piece_progress | kinds.block_progress
    return {
        "listen_interfaces": listen + ("s" if is_encrypted else ""),
        "outgoing_interfaces": own,
        "listen_system_port_fallback": False,
        "max_retry_port_bind": 0,
        "alert_mask": int(mask),
        "alert_queue_size": 100_000,
        # Nobody but members.
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": False,  # 20 times slower
        "enable_outgoing_utp": False,
        "in_enc_policy": 2,  # RC4 is slow and proves nothing
        "out_enc_policy": 2,
        "ssrf_mitigation": False,
        "allow_multiple_connections_per_ip": True,
        # There are no hashes: the agent checks.
        "disable_hash_checks": True,
        "tick_interval": 100,  # the first piece comes after 0.1 s, not 0.5
        "unchoke_slots_limit": -1,
        "max_out_request_queue": 256,  # 1.50 of the bound where 2000 took 1.84
        "max_allowed_in_request_queue": 4000,
        "request_queue_time": 1,
        "connection_speed": 500,
        "connections_limit": 1000,
        "close_redundant_connections": False,
        "min_reconnect_time": 1,
        "max_failcount": 100,
        "peer_timeout": 30,
        "handshake_timeout": 10,
        "active_limit": -1,
        "active_downloads": -1,
        "active_seeds": -1,
        "mixed_mode_algorithm": 0,
        "send_buffer_watermark": 8 << 20,
        "send_buffer_low_watermark": 1 << 20,
        "send_buffer_watermark_factor": 200,
        "piece_extent_affinity": False,
        "auto_sequential": False,
        "rate_limit_ip_overhead": False,
    }
