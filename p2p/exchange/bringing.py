"""Bringing a chunk from peers: one after the other is asked, and what came is checked."""

import logging
import time
from collections.abc import Callable

from blake3 import blake3

from weightstream import metrics
from weightstream.errors import UnavailableError, WeightstreamError
from weightstream.p2p.exchange.client import (
    AbsentError,
    BrokenOffError,
    ChunkName,
    ElsewhereError,
    PeerError,
)
from weightstream.p2p.exchange.crowds import Crowd
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.gathering import Gathering
from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.sinks import (
    FlightSink,
    HurryError,
    PartsError,
    ScatteredError,
    SlowError,
    TakenError,
    WrongError,
)
from weightstream.p2p.exchange.vouching import ask_digests
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import ORIGIN, View, acting_home, route

log = logging.getLogger(__name__)

_ROOM_S = 30.0
_TRIES = 8
_HASHING_S, _LOOK_S = 0.8, 0.05
"""8 MiB take 10 ms to hash, more on a busy machine."""


class Bringer:
    """Brings one blob's flights. Thread-safe."""

    def __init__(
        self,
        parts: Parts,
        crowd: Crowd,
        chunk_size: int,
        view: Callable[[bool, frozenset[str]], View],
        mixed: Callable[[], None],
    ) -> None:
        """`view` says what the schedule decides by: for urgent flights or others, and without those
        that were left because they were slow; `mixed` hears when a chunk came wrong in parts."""
        self._parts = parts
        self._crowd = crowd
        self._chunk_size = chunk_size
        self._view = view
        self._mixed = mixed

    def bring(self, flight: Flight) -> None:
        """Bring a chunk that the caller has claimed; it lands or fails."""
        try:
            self._bring(flight)
        except WeightstreamError as error:
            flight.fail(error)
        except Exception as error:
            log.exception("unexpected, at %s chunk %d", flight.blob.uri, flight.chunk)
            flight.fail(WeightstreamError(f"{flight.blob.uri} chunk {flight.chunk}: {error!r}"))

    def _bring(self, flight: Flight) -> None:
        flight.raise_if_over()
        slab = flight.slab or self._parts.shelf.take(flight, _ROOM_S)
        if slab is None:
            raise UnavailableError(f"{flight.blob.uri} {flight.extent}: no memory for it")
        flight.begin(slab)
        with flight.memory() as view:
            digest = self._from_peers(flight, view)
        flight.asking, flight.chain = "", ()
        if digest is None:
            self._parts.gate.resort(flight)
            return
        if flight.land(digest):
            self._parts.shelf.put(flight)

    def bring_held(self, flight: Flight) -> bool:
        """Bring a chunk that the origin did not give from who has it, however slow that is; False
        when nobody gave it."""
        crowd, alive = self._view(flight.urgent, frozenset()), self._parts.neighbours.alive()
        having = crowd.holders.get(flight.chunk, frozenset()).intersection(alive)
        slab = flight.slab or (self._parts.shelf.take(flight, _ROOM_S) if having else None)
        if slab is None or flight.is_over:
            return False
        flight.begin(slab)
        flight.is_whole = True  # each is asked once
        for node in sorted(having, key=lambda node: (node in crowd.slow, node)):
            try:
                digest = self._ask_holder(flight, alive[node])
            except WeightstreamError as error:
                log.info("%s; nor did the origin give chunk %d", error, flight.chunk)
                continue
            finally:
                flight.asking, flight.chain = "", ()
            if flight.land(digest):
                self._parts.shelf.put(flight)
            return True
        return False

    def _ask_holder(self, flight: Flight, member: Member) -> bytes:
        """Return what a holder says the chunk is that it gave; a reader may come meanwhile."""
        flight.urgent |= flight.is_hurried
        flight.restart()
        with flight.memory() as view:
            try:
                return self._ask(flight, member, view, insist=False, is_last=True)
            except HurryError:
                flight.urgent = True
                flight.restart()
                return self._ask(flight, member, view, insist=False, is_last=True)

    def _from_peers(self, flight: Flight, view: memoryview) -> bytes | None:
        """Ask one after the other; None when it is the origin's turn."""
        tried: dict[str, int] = {}
        again: set[str] = set()  # who broke off is asked once more: who is gone does not answer
        left: set[str] = set()  # because they were slow: whoever stands in for them, may be we
        named = namer = ""
        for _ in range(_TRIES):
            view_now = self._view(flight.urgent, frozenset(left))
            way = route(view_now, flight.chunk)
            node = named or next((ask for ask in way.asks if not tried.get(ask)), ORIGIN)
            insist = node not in way.relays and node != acting_home(view_now, flight.chunk)
            insist |= bool(named or node == namer)
            if not named and namer and tried[namer] < 2:  # whom it named does not give it
                node, insist = namer, True
            named = ""
            member = self._parts.neighbours.alive().get(node)
            tried[node] = tried.get(node, 0) + 1
            if node in (ORIGIN, self._parts.me):
                return None
            if member is None:
                continue
            try:
                return self._ask(flight, member, view, insist)
            except ElsewhereError as other:
                named = other.node if tried.get(other.node, 0) < 2 else ""
                namer = node
            except TakenError:
                return None
            except HurryError:
                flight.urgent, tried[node] = True, tried[node] - 1
            except PartsError as error:
                log.info("%s; asking %s for all of it", error, node)
                tried[node] -= 1
            except AbsentError as error:
                log.debug("%s", error)
                self._crowd.note(node, flight.chunk, False)
            except PeerError as error:
                log.info("%s; asking somebody else for chunk %d", error, flight.chunk)
                metrics.PEER_FAILURES.labels("broken").inc()
                if isinstance(error, SlowError):
                    namer = ""
                    left.add(node)
                elif isinstance(error, BrokenOffError) and node not in again:
                    again.add(node)
                    tried[node] -= 1
                else:
                    self._parts.suspect(node, str(error))
            flight.restart()
        return None

    def _ask(
        self,
        flight: Flight,
        member: Member,
        view: memoryview,
        insist: bool,
        is_last: bool = False,
    ) -> bytes:
        name = ChunkName(flight.blob, self._chunk_size, flight.chunk)
        flight.asking, flight.chain = member.node, (member.node,)
        if self._crowd.taker(flight.chunk) == self._parts.me:
            raise TakenError("it is this node's to read now")
        sink = FlightSink(flight, member.node, self._parts.me, self._parts.neighbours, is_last)
        try:
            said = self._parts.client.fetch(member, name, view, sink, flight.urgent, insist)
        except ScatteredError:
            return self._gather(flight, member, name, view)
        except PeerError as error:
            if flight.is_hurried and not flight.urgent:
                raise HurryError("a reader waits for it") from error
            raise
        self._check(flight, member, view, said)
        self._crowd.note(member.node, flight.chunk, True)
        metrics.PEER_BYTES.labels("received").inc(len(view))
        return said

    def _gather(self, flight: Flight, home: Member, name: ChunkName, view: memoryview) -> bytes:
        """Bring the rest of a chunk in blocks; `PartsError` has its home asked for all of it. When
        it came wrong nobody is banned: whoever passed a block on may have got it wrong itself."""
        scatter, what = flight.scatter, f"{flight.blob.uri} chunk {flight.chunk}"
        assert scatter is not None
        log.debug("%s: the rest is shared", what)
        metrics.PEER_BYTES.labels("received").inc(flight.position)
        flight.is_whole = True  # the next time, if this fails
        client, neighbours = self._parts.client, self._parts.neighbours
        gathering = Gathering(flight, view, name, scatter, self._parts.me, neighbours)
        try:
            gathering.bring(client, neighbours.alive())
            said = self._said(flight, home)
        except HurryError:
            raise
        except PeerError as error:
            raise PartsError(f"{what} did not come in parts: {error}") from error
        if said is None:
            raise PartsError(f"peer {home.node} has let go of {what}")
        if blake3(view).digest() != said:
            self._mixed()
            metrics.PEER_FAILURES.labels("mixed").inc()
            raise PartsError(f"{what} came wrong from several peers")
        if neighbours.is_banned(home.node):
            raise WrongError(f"peer {home.node} gave wrong bytes of another chunk")
        published = self._parts.digest_of(flight.blob, self._chunk_size, flight.chunk)
        self._check_published(flight, home, said, published)
        self._crowd.note(home.node, flight.chunk, True)
        return said

    def _said(self, flight: Flight, home: Member) -> bytes | None:
        """Return what a home says a chunk is that it shared; it may not have hashed it yet. Who is
        asked does not wait: members of a swarm ask for many at once (crowds of 8 took 1.20 to 1.62
        of the bound where it did, 1.18 and 1.23 where not)."""
        client, chunk = self._parts.client, flight.chunk
        until_s = time.monotonic() + _HASHING_S
        while True:
            vouched = ask_digests(client, home, flight.blob.id, self._chunk_size, [chunk])
            said = vouched.digests.get(chunk)
            if said is not None or flight.asks_again or time.monotonic() > until_s:
                return said
            time.sleep(_LOOK_S)

    def _check(self, flight: Flight, member: Member, view: memoryview, said: bytes) -> None:
        """Compare what came with what the peer says it is, and with what was published."""
        found = blake3(view).digest()
        published = self._parts.digest_of(flight.blob, self._chunk_size, flight.chunk)
        if found == said:
            self._check_published(flight, member, said, published)
            return
        metrics.PEER_FAILURES.labels("wrong").inc()
        self._parts.neighbours.ban(member.node)
        where = f"{member.node} at {member.host}:{member.port}"
        what = f"{flight.blob.uri} {flight.extent}"
        text = f"peer {where} sent wrong bytes of {what}: not asked again"
        log.warning("%s", text)
        raise WrongError(text)

    def _check_published(
        self, flight: Flight, member: Member, said: bytes, published: bytes | None
    ) -> None:
        """Refuse a chunk that is not what was published. Its sender is not banned: whoever may
        write the manifest could have everybody banned with a wrong one. The origin decides."""
        if published in (None, said):
            return
        metrics.PEER_FAILURES.labels("unpublished").inc()
        what = f"{flight.blob.uri} {flight.extent}"
        log.warning("%s of peer %s is not what was published", what, member.node)
        raise AbsentError(f"{what} of peer {member.node} is not what was published")
