"""The exchange of a node: one `Source` whose bytes come from peers, or from the origin once.

    reader -> read_into -> flight <- bring (a peer) | gate (the origin, this node's part)
    peer   -> server    -> flight, or the store's file

Locks: `_lock` guards the table of relays and is never held across I/O.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from weightstream import __version__, metrics
from weightstream.cachefs.agent.peering import PeeringStatus
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.checks import Summed
from weightstream.cachefs.fetch.slabs import SlabPool
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.store import Store
from weightstream.errors import LoadCancelled, UsageError
from weightstream.p2p.exchange import holding, scattering
from weightstream.p2p.exchange.bulk import Bulk, Planned
from weightstream.p2p.exchange.carrier import Carrier, carry
from weightstream.p2p.exchange.client import PeerClient
from weightstream.p2p.exchange.flights import Flight, FlightState, Shelf
from weightstream.p2p.exchange.gate import Gate
from weightstream.p2p.exchange.joining import Joining
from weightstream.p2p.exchange.lanes import Lanes
from weightstream.p2p.exchange.parts import Neighbours, Parts
from weightstream.p2p.exchange.rate import Rate
from weightstream.p2p.exchange.reading import ChunkReader
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.server import Asked, HeldChunk, Server
from weightstream.p2p.exchange.taking import Taking, give
from weightstream.p2p.exchange.vouching import answer, parse_question
from weightstream.p2p.identity import Identity
from weightstream.p2p.members import Membership
from weightstream.p2p.schedule import ORIGIN, route
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_BYTES = 'weightstream_peer_bytes_total{{way="{}"}}'
_HOUSE_S = 0.5
_REST_S = 20.0
_LEAVE_S = 60.0
"""A swarm in which nothing moves, and that nobody reads from, is left, and its file removed."""
_FORGET_S = 300.0
_STREAMS_ALONE = 8


class _Plan:
    """What one reader asked for; see `Exchange.plan`."""

    def __init__(self, exchange: "Exchange", planned: Sequence[Planned]) -> None:
        self._exchange = exchange
        self.planned = planned

    def hurry(self, blob: Blob, extent: Extent) -> None:
        """See `Plan`."""
        for one in self.planned:
            if one.relay.blob == blob:
                one.relay.hurry_running(extent)

    def close(self) -> None:
        """Say that the reader is done."""
        self._exchange.end_plan(self.planned)


class Exchange:
    """Satisfies `Source` and `Home`; thread-safe; close it."""

    name = "peers"
    brings = True

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        store: Store | None,
        slabs: SlabPool,
        budget_bytes: int,
        sources: Callable[[Blob], Source | None],
        digest_of: Callable[[Blob, int, int], bytes | None] = lambda blob, size, chunk: None,
        carrier: Carrier | None = None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._sources = sources
        self._lock = threading.Lock()
        self._relays: dict[tuple[str, int], Relay] = {}
        self._closed = False
        self._draining = False
        self._membership: Membership | None = None
        self._sending, receiving = Lanes(), Lanes()
        self._shelf = Shelf(slabs, budget_bytes // 2, self._is_stored)
        self._shelf.on_drop = self._forget
        self._received = Rate(self.progress)
        self._bulk = Bulk(self._shelf, settings.peer_window, settings.chunk_size)
        self._client = PeerClient(identity, receiving)
        self._gate = Gate(
            self._bulk, self._shelf, receiving, self._client.paces, sources, settings.deadline_s,
            self._streams, self._link_share, self._bring_held, self._hold_others,
        )  # fmt: skip
        self._neighbours = Neighbours(
            lambda: self._membership.members() if self._membership else (), self._client
        )
        self._parts = Parts(
            identity.node, store, self._shelf, self._gate, self._client, self._neighbours,
            self._suspect, self._may_read, digest_of, carrier,
        )  # fmt: skip
        self._reader = ChunkReader(settings.deadline_s, lambda: self._closed)
        self._joining = Joining(self._parts, settings)
        self._server = Server(settings.peer_listen, self, identity, self._sending)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="weightstream-manifest")
        self._asleep = threading.Event()
        threading.Thread(target=self._keep_house, daemon=True, name="weightstream-relays").start()

    @property
    def port(self) -> int:
        """Return where peers are served."""
        return self._server.port

    def attach(self, membership: Membership) -> None:
        """Take part: these are the members. Until then the node is alone."""
        self._membership = membership
        membership.on_change = self._members_changed

    # What local readers call

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`; see `Source.read_into`."""
        urgent = transfer.urgent
        relay = self._relay(blob)
        self._joining.wait(relay, urgent)
        done = 0
        while done < len(into):
            i, offset = divmod(start + done, relay.chunk_size)
            count = min(len(relay.chunk(i)) - offset, len(into) - done)
            self._reader.read(relay, i, offset, into[done : done + count], transfer, urgent)
            urgent = False  # what is read behind the chunk that somebody waits for is bulk
            done += count

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return the origin's checksum of the whole file, if it keeps one."""
        source = self._sources(blob)
        if not isinstance(source, Summed):
            return None
        return source.checksum(blob)

    def refute(self, blob: Blob) -> None:
        """Hear that what was read of a blob is not what the origin has: some peer lies, and nobody
        can tell which. It is read from the origin from now on."""
        text = "%s came wrong from peers: it is read from the origin from now on"
        log.warning(text, blob.uri)
        metrics.PEER_FAILURES.labels("refuted").inc()
        self._relay(blob).refute()

    def plan(self, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> _Plan:
        """Begin with what a reader is going to want; it says `close` when it is done."""
        relays = [(self._relay(blob), extents) for blob, extents in wanted if blob.version]
        planned = [Planned(relay, extents, Taking(self._parts, relay)) for relay, extents in relays]
        for one in planned:
            carry(one.relay, self._parts.carrier)
        threading.Thread(
            target=self._begin_plan, args=(planned,), daemon=True, name="weightstream-plan"
        ).start()
        return _Plan(self, planned)

    def end_plan(self, planned: Sequence[Planned]) -> None:
        """See `_Plan.close`."""
        self._bulk.remove(planned)
        going_on = self._bulk.blobs
        for one in planned:
            one.relay.rest()
            carried = one.relay.carried
            if carried is not None and one.relay.blob not in going_on:
                carried.rest()

    def _begin_plan(self, planned: Sequence[Planned]) -> None:
        for one in planned:
            carried = one.relay.carried
            if carried is not None:
                carried.want(one.chunks)
            self._joining.begin_planned(one.relay)
            with self._lock:
                if self._closed:
                    return
                self._pool.submit(self._parts.digest_of, one.relay.blob, one.relay.chunk_size, 0)
        for one in planned:
            self._joining.wait(one.relay, urgent=False)
        self._bulk.add([one for one in planned if one.is_open])
        self._gate.poke()  # first: bulk's threads fault their memory in before they ask
        self._bulk.poke()

    # What the server asks

    def hello(self) -> Mapping[str, Any]:
        """See `Home`."""
        return {
            "node": self._identity.node,
            "instance": self._identity.instance,
            "zone": self._identity.zone,
            "version": __version__,
        }

    def joined(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Home`."""
        return self._joining.joined(message, self._known, self._peek)

    def digests(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Home`."""
        blob_id, chunk_size, chunks = parse_question(message)
        relay = self._known(blob_id, chunk_size)
        if relay is None:
            return answer({}, ())
        asked = [i for i in chunks if i < relay.n_chunks]
        return answer({i: relay.digest(i) for i in asked}, filter(relay.stands_by, asked))

    def progress(self) -> int:
        """See `Home`."""
        return self._gate.read_bytes + self._client.received_bytes

    def take(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Home`."""
        return {} if self._draining else give(message, self._known, self._parts)

    def left(self, message: Mapping[str, Any]) -> None:
        """See `Home`."""
        node = str(message.get("node", ""))
        for relay in self._all_relays():
            relay.crowd.remove(node)

    def give(
        self, blob_id: str, chunk_size: int, chunk: int, asked: Asked
    ) -> Flight | HeldChunk | str | None:
        """See `Home`."""
        relay = self._known(blob_id, chunk_size)
        if relay is None or not 0 <= chunk < relay.n_chunks or self._draining:
            return None
        relay.used_s = time.monotonic()
        flight = relay.flight(chunk)
        reader = None if asked.insist else relay.taker(chunk)
        elsewhere = reader if reader != self._identity.node else None
        if flight is None or flight.is_parked:
            return relay.held(chunk) or elsewhere or self._give_unheld(relay, chunk, asked)
        if not self._is_passable(relay, flight, asked):
            return None
        if elsewhere and not flight.is_over:
            return elsewhere
        flight.is_needed = True
        if asked.fault and flight.is_at_gate:
            self._gate.hurry(flight)
        return flight

    def give_part(self, blob_id: str, chunk_size: int, chunk: int) -> Flight | HeldChunk | None:
        """See `Home`."""
        relay = self._known(blob_id, chunk_size)
        if relay is None or not 0 <= chunk < relay.n_chunks:
            return None
        flight = relay.flight(chunk)
        return relay.held(chunk) if flight is None or flight.is_parked else flight

    def scatter(self, flight: Flight, receivers: tuple[str, ...]) -> None:
        """See `Home`."""
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        if relay is not None:
            scattering.scatter(self._parts, relay, flight, receivers)

    def scattered(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Home`."""
        return scattering.hear(message, self._known, self._parts)

    def is_late(self, flight: Flight) -> bool:
        """See `Home`."""
        if flight.state is FlightState.LANDED:
            return self._gate.is_idle
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        return relay is not None and flight.from_origin and relay.is_last(flight.chunk)

    def hold(self, message: Mapping[str, Any]) -> None:
        """See `Home`."""
        if holding.is_of_a_home(message, self._known, self._parts):
            self._gate.hold()

    @staticmethod
    def _is_passable(relay: Relay, flight: Flight, asked: Asked) -> bool:
        """Say that a peer may wait on it: not when this node has asked that very peer for it."""
        is_taken = asked.insist and relay.is_taking(flight.chunk)
        return flight.position > 0 or flight.asking != asked.node or is_taken

    def _give_unheld(self, relay: Relay, chunk: int, asked: Asked) -> Flight | str | None:
        first = route(relay.view(), chunk).asks[0]
        if first == asked.node and not (asked.insist and relay.is_taking(chunk)):
            return None if asked.insist else first
        if asked.insist or first == ORIGIN:
            if not self._may_read(relay.blob):
                return None
            flight, new = relay.board(chunk)
            flight.is_needed = True
            if new or flight.is_parked:
                relay.want_own(flight, asked.fault)
            return flight
        return relay.want(chunk, asked.fault)  # passed on to whom we are a parent in a tree

    # Relays

    def _may_read(self, blob: Blob) -> bool:
        return self._sources(blob) is not None

    def _relay(self, blob: Blob) -> Relay:
        if not blob.version or not blob.size:
            raise UsageError(f"{blob.uri} has no version, or no bytes: it cannot be shared")
        key = blob.id, self._settings.chunk_size
        with self._lock:
            if self._closed:
                raise LoadCancelled("the exchange was closed")
            relay = self._relays.get(key)
            if relay is None:
                relay = self._relays[key] = Relay(blob, self._settings.chunk_size, self._parts)
        relay.used_s = time.monotonic()
        return relay

    def _known(self, blob_id: str, chunk_size: int) -> Relay | None:
        with self._lock:
            return self._relays.get((blob_id, chunk_size))

    def _peek(self, blob: Blob) -> Relay | None:
        """Return the relay of a blob that a peer speaks of: known here, or in the store."""
        relay = self._known(blob.id, self._settings.chunk_size)
        if relay is None and self._parts.store is not None:
            probe = Relay(blob, self._settings.chunk_size, self._parts)
            if any(probe.held_flags()):
                with self._lock:
                    relay = self._relays.setdefault((blob.id, probe.chunk_size), probe)
            if relay is not probe:
                probe.close()
        return relay

    def _all_relays(self) -> list[Relay]:
        with self._lock:
            return list(self._relays.values())

    def _is_stored(self, flight: Flight) -> bool:
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        return relay is not None and relay.is_stored(flight.chunk)

    def _forget(self, flight: Flight) -> None:
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        if relay is not None:
            relay.forget(flight)

    def _hold_others(self, flight: Flight) -> None:
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        if relay is not None:
            holding.hold_others(self._parts, relay)

    def _bring_held(self, flight: Flight) -> bool:
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        return relay is not None and relay.bring_held(flight)

    # Members

    def _streams(self) -> int:
        """Return how many bulk streams the gate may have: see `Gate`."""
        crowds = [len(relay.crowd.nodes) for relay in self._all_relays() if not relay.is_idle]
        return max(1, _STREAMS_ALONE // (max(crowds, default=1) ** 2))

    def _link_share(self, flight: Flight) -> float | None:
        """See `Transfer.link_share`: in a crowd that loads, what comes here came from the origin a
        moment ago, so an equal part of it is what each that reads should bring. For a fault all
        others make room."""
        relay = self._known(flight.blob.id, self._settings.chunk_size)
        if relay is None or relay.crowd.is_refuted or flight.urgent or self._streams() > 1:
            return None
        relays = (one for one in self._all_relays() if not one.is_idle)
        others = set[str]().union(*(one.readers() for one in relays))
        return self._received.bytes_s() / (len(others) + 1) if others else None

    def _suspect(self, node: str, why: str) -> None:
        if self._membership is not None:
            self._membership.suspect(node, why)

    def _members_changed(self) -> None:
        """Tell those who are new what we load, and look anew what is ours."""
        self._joining.members_changed(self._all_relays())
        self._gate.poke()

    # Life

    def status(self) -> PeeringStatus:
        """Return what is going on."""
        crowds = {r.blob.uri: len(r.crowd.nodes) for r in self._all_relays() if not r.is_idle}
        counted = metrics.samples()
        ways = ["received", "sent", "origin"]
        if self._parts.carrier is not None:
            ways += ["swarm_received", "swarm_sent"]
        return PeeringStatus(
            members=tuple(sorted((self._identity.node, *self._neighbours.alive()))),
            crowds=crowds,
            bytes={way: int(counted.get(_BYTES.format(way), 0)) for way in ways},
            settled=self._membership is not None and self._membership.is_settled,
        )

    def drain(self) -> None:
        """Serve nothing new; tell the others."""
        self._draining = True
        self._joining.leave()

    def close(self) -> None:
        """End everything; whoever reads gets `LoadCancelled`."""
        with self._lock:
            self._closed = True
            relays = list(self._relays.values())
        self._asleep.set()
        self._joining.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._bulk.close()
        self._server.close()
        self._client.close()
        self._gate.close()
        for relay in relays:
            relay.fail(LoadCancelled("the exchange was closed"))
            relay.close()
        self._shelf.drop_all()
        if self._parts.carrier is not None:
            self._parts.carrier.close()
        if self._membership is not None:
            self._membership.close()

    def _keep_house(self) -> None:
        """Let go of memory that nobody asked for in a while, and forget what is long done."""
        while not self._asleep.wait(_HOUSE_S):
            now_s = time.monotonic()
            self._gate.look()
            relays = self._all_relays()
            if all(now_s - relay.used_s > _REST_S for relay in relays):
                self._shelf.drop_idle()
            for relay in relays:
                if now_s - relay.used_s > _LEAVE_S and relay.blob not in self._bulk.blobs:
                    relay.drop_carried()
                is_old = now_s - relay.used_s > _FORGET_S
                if is_old and relay.is_idle and not relay.crowd.is_refuted:
                    with self._lock:
                        self._relays.pop((relay.blob.id, relay.chunk_size), None)
                    self._joining.forget(relay)
                    relay.close()
