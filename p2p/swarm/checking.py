"""Whether what came is right, and what is done when it is not.

A chunk is hashed where it lies in the file, and compared with the published hash, with this node's
own, or with what members vouch for: who reads it from the origin first, as far as this node knows.
A chunk that is wrong, or that nobody vouches for, is brought by the exchange, and the file mended
with it: libtorrent reads the file when it passes a piece on, so from then on right bytes go out.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.vouching import Vouched
from weightstream.p2p.swarm.cargo import Cargo
from weightstream.p2p.swarm.policy import senders_of
from weightstream.p2p.swarm.torrent import LEAST_PIECE_BYTES

log = logging.getLogger(__name__)

_STEP_BYTES = 1 << 20
_BLOCK_BYTES = LEAST_PIECE_BYTES
_TRIES = 3
"""So often a member is asked for a hash before the next one is: it may be about to know."""
_UNVOUCHED_S = 3.0
_MEND_S = 60.0
_LOOK_S = 0.1

Blame = Callable[[Relay, int, str], None]


class Checker:
    """Checks one cargo's chunks. `step` is one thread's; the rest runs in the pool."""

    def __init__(self, cargo: Cargo, pool: ThreadPoolExecutor, blame: Blame) -> None:
        self.cargo = cargo
        self._pool = pool
        self._blame = blame
        self._lock = threading.Lock()
        self._heard: dict[int, bytes] = {}
        self._asked: dict[int, int] = {}
        self._asking: set[str] = set()
        self._mending: set[int] = set()
        self._closed = threading.Event()

    def close(self) -> None:
        """Wait for nothing any more."""
        self._closed.set()

    def step(self) -> None:
        """Check what is ready; ask for the hashes that are missing."""
        if self.cargo.is_over:
            return
        unknown: list[int] = []
        for chunk, since_s in sorted(self.cargo.ready.items()):
            if chunk in self._mending:
                continue
            expected = self._expected(chunk)
            if expected is not None:
                self._check(chunk, expected)
            elif time.monotonic() - since_s > _UNVOUCHED_S:
                self._start_mending(chunk)
            else:
                unknown.append(chunk)
        self._ask(unknown)

    def _expected(self, chunk: int) -> bytes | None:
        relay = self.cargo.relay
        return relay.published(chunk) or relay.digest(chunk) or self._heard.get(chunk)

    def _check(self, chunk: int, expected: bytes) -> None:
        if self._hash(chunk) == expected:
            self.cargo.accept(chunk, expected, mended=False)
        else:
            self._start_mending(chunk)

    def _hash(self, chunk: int) -> bytes:
        extent, hasher = self.cargo.relay.chunk(chunk), blake3()
        buffer = memoryview(bytearray(min(_STEP_BYTES, len(extent))))
        with open(self.cargo.path, "rb", buffering=0) as file:
            at = extent.start
            while at < extent.stop:
                want = buffer[: min(len(buffer), extent.stop - at)]
                count = os.preadv(file.fileno(), [want], at)
                if not count:
                    break
                hasher.update(want[:count])
                at += count
        return hasher.digest()

    # Asking

    def _ask(self, chunks: Iterable[int]) -> None:
        by_node: dict[str, list[int]] = {}
        for chunk in chunks:
            node = self._whom(chunk)
            if node and node not in self._asking:
                by_node.setdefault(node, []).append(chunk)
        for node, some in by_node.items():
            self._asking.add(node)
            self._pool.submit(self._ask_node, node, some)

    def _whom(self, chunk: int) -> str:
        """Return the member to ask: its reader, then others in the order of stand-ins."""
        nodes = self.cargo.relay.vouchers(chunk)
        turn = self._asked.get(chunk, 0) // _TRIES
        return nodes[turn % len(nodes)] if nodes else ""

    def _ask_node(self, node: str, chunks: Sequence[int]) -> None:
        found, tries = Vouched(), 1
        try:
            found = self.cargo.relay.ask_digests(node, chunks)
        except PeerError as error:
            log.info("%s", error)
            tries = _TRIES
        finally:
            with self._lock:
                self._heard.update(found.digests)
                for chunk in chunks:
                    self._asked[chunk] = self._asked.get(chunk, 0) + tries
            self._asking.discard(node)

    # Mending

    def _start_mending(self, chunk: int) -> None:
        self._mending.add(chunk)
        self._pool.submit(self._mend, chunk)

    def _mend(self, chunk: int) -> None:
        """Have the exchange bring a chunk, and write what differs into the file."""
        try:
            relay = self.cargo.relay
            flight = relay.want(chunk, urgent=True)
            slab = flight.hold() if self._wait_over(flight) else None
            if slab is None:
                log.info("%s %s: not mended yet", relay.blob.uri, relay.chunk(chunk))
                return
            try:
                wrong = self._write_over(chunk, slab.view)
            finally:
                slab.release()
            senders = senders_of(wrong, dict(self.cargo.senders))
            self._heard[chunk] = flight.digest
            self.cargo.accept(chunk, flight.digest, mended=bool(wrong))
            for host in senders:
                self._blame(relay, chunk, host)
        except OSError as error:
            self.cargo.fail(str(error))
        except Exception:
            log.exception("unexpected, mending chunk %d of %s", chunk, self.cargo.relay.blob.uri)
        finally:
            self._mending.discard(chunk)

    def _wait_over(self, flight: Flight) -> bool:
        """Wait for the end of a flight; False when time is up, or the checker is closed."""
        until_s = time.monotonic() + _MEND_S
        while not self._closed.is_set() and time.monotonic() < until_s:
            if flight.wait_over(_LOOK_S):
                return True
        return False

    def _write_over(self, chunk: int, right: memoryview) -> Mapping[int, set[int]]:
        """Make the file right; return the blocks that were wrong, by piece."""
        wrong: dict[int, set[int]] = {}
        shape, start = self.cargo.shape, self.cargo.relay.chunk(chunk).start
        with open(self.cargo.path, "r+b", buffering=0) as file:
            for piece in shape.pieces(chunk):
                extent = shape.piece(piece)
                for at in range(extent.start, extent.stop, _BLOCK_BYTES):
                    count = min(_BLOCK_BYTES, extent.stop - at)
                    block = right[at - start : at - start + count]
                    if os.pread(file.fileno(), count, at) != block:
                        os.pwrite(file.fileno(), block, at)
                        wrong.setdefault(piece, set()).add((at - extent.start) // _BLOCK_BYTES)
        return wrong
