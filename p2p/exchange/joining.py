"""How a crowd comes together: who begins with a blob tells every member, and hears who has it.

A crowd that starts as one must not begin as so many nodes that are each alone: so after the answers
are in, bulk waits until 80 ms have passed since the first word, and since the last that somebody
else said, half a second at most. A fault does not wait for that.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from weightstream.cachefs.blob import Blob
from weightstream.p2p.exchange.carrier import carry
from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.crowds import pack_flags, unpack_flags
from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.wire import WireError
from weightstream.p2p.members import Member
from weightstream.p2p.schedule.homes import late_start
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_BATCH_S = 0.08
_MOST_BATCH_S = 0.5
_BATCH_TIMES = 2.0
"""Where it takes long to ask everybody, others take as long to begin: with 8 nodes on 2 cores 0.1
to 0.2 s, and those who came after 80 ms were home of nothing."""
_LONGEST_S = 2.0
_MOST_BLOB_BYTES = 1 << 50
_MOST_CHUNKS = 1 << 22
_MOST_START = 1 << 40


class Joining:
    """Thread-safe."""

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self._parts = parts
        self._settings = settings
        self._lock = threading.Lock()
        self._asked: dict[Relay, dict[str, object]] = {}
        """Who was told, and in which swarm it was told that this node takes part; see `_swarm`."""
        self._answered: dict[Relay, threading.Event] = {}
        self._begun_s: dict[Relay, float] = {}
        self._batch_s: dict[Relay, float] = {}
        self._heard_s: dict[Relay, float] = {}
        """When somebody last began who had not before."""
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="weightstream-join")
        self._closed = False

    def begin(self, relay: Relay) -> None:
        """Tell every member that this node loads the blob, once; returns at once."""
        with self._lock:
            if relay in self._answered:
                return
            self._answered[relay] = threading.Event()
            self._begun_s[relay] = time.monotonic()
            self._asked[relay] = {}
        _spawn(self._ask_first, relay)

    def begin_planned(self, relay: Relay) -> None:
        """Begin, and tell whoever was told before this node took part in the blob's swarm: a reader
        may have come before the plan."""
        self.begin(relay)
        if self._answered[relay].is_set():  # else who asks first looks again when it is done
            _spawn(self._ask_all, relay)

    def wait(self, relay: Relay, urgent: bool) -> None:
        """Return when it is known who else loads it; begins to ask if nobody has."""
        self.begin(relay)
        self._answered[relay].wait(_LONGEST_S)
        if urgent or not self._parts.neighbours.alive():
            return
        while (left_s := self._batch_until_s(relay) - time.monotonic()) > 0:
            time.sleep(left_s)

    def _batch_until_s(self, relay: Relay) -> float:
        begun_s = self._begun_s.get(relay, 0.0)
        calm_s = self._heard_s.get(relay, 0.0) + _BATCH_S
        batch_s = self._batch_s.get(relay, _BATCH_S)
        return max(begun_s + batch_s, min(calm_s, begun_s + _MOST_BATCH_S))

    def members_changed(self, relays: Sequence[Relay]) -> None:
        """Tell those who are new."""
        _spawn(self._ask_new, relays)  # not in the pool, on which it waits

    def joined(
        self,
        message: Mapping[str, Any],
        known: Callable[[str, int], Relay | None],
        peek: Callable[[Blob], Relay | None],
    ) -> Mapping[str, Any]:
        """Hear that a node loads a blob; answer what this node has of it."""
        node, blob, chunk_size = _parse(message)
        if chunk_size != self._settings.chunk_size:
            return {"joined": False}
        relay = known(blob.id, chunk_size) or peek(blob)
        if relay is None:
            return {"joined": False}
        held = unpack_flags(message.get("held"), relay.n_chunks)
        began = relay.has_begun
        start = message.get("start")
        if isinstance(start, int) and 0 <= start < _MOST_START:
            relay.crowd.add(node, message.get("reads_origin") is True, held, start)
        elif not began:
            with self._lock:
                if relay in self._answered:
                    self._heard_s[relay] = time.monotonic()
            relay.crowd.add(node, message.get("reads_origin") is True, held, 0)
        if message.get("swarm") and began:
            carry(relay, self._parts.carrier)
        relay.meet(node, message.get("swarm"))
        return self._about(relay)

    def leave(self) -> None:
        """Tell everybody that this node is about to end."""
        for member in self._parts.neighbours.alive().values():
            try:
                self._parts.client.tell(member, "/v1/leave", {"node": self._parts.me})
            except PeerError as error:
                log.debug("not told: %s", error)

    def close(self) -> None:
        """End the threads that ask."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, relay: Relay) -> None:
        """Drop what is known of a relay that ends."""
        with self._lock:
            self._asked.pop(relay, None)
            self._answered.pop(relay, None)
            self._begun_s.pop(relay, None)
            self._batch_s.pop(relay, None)
            self._heard_s.pop(relay, None)

    def _about(self, relay: Relay) -> dict[str, Any]:
        loads, held = relay in self._answered, relay.held_flags()
        return {
            "joined": loads,
            "reads_origin": (loads or any(held)) and self._parts.may_read(relay.blob),
            "held": pack_flags(held),
            "begun": any(held),
            "start": relay.crowd.starts[self._parts.me],
            "swarm": relay.swarm_port,
        }

    def _ask_new(self, relays: Sequence[Relay]) -> None:
        for relay in relays:
            answered = self._answered.get(relay)
            if answered is not None and answered.is_set():
                self._ask_all(relay)

    def _ask_first(self, relay: Relay) -> None:
        try:
            self._ask_all(relay, first=True)
        finally:
            asking_s = time.monotonic() - self._begun_s.get(relay, 0.0)
            batch_s = min(_MOST_BATCH_S, max(_BATCH_S, _BATCH_TIMES * asking_s))
            self._batch_s.setdefault(relay, batch_s)
            self._answered[relay].set()
        self._ask_all(relay)  # whom a reader had told before the load's plan took part in a swarm

    def _ask_all(self, relay: Relay, first: bool = False) -> None:
        """Tell those who do not know yet that this node loads it, and in which swarm."""
        members, swarm = self._parts.neighbours.alive(), _swarm(relay)
        with self._lock:
            if relay not in self._asked:
                return
            # who was away and came back is told again
            asked = {node: told for node, told in self._asked[relay].items() if node in members}
            new = [
                member
                for node, member in members.items()
                if node not in asked or (swarm is not None and asked[node] != swarm)
            ]
            self._asked[relay] = asked | {member.node: swarm for member in new}
        if not new:
            return
        blob = relay.blob
        message = {
            "node": self._parts.me,
            "uri": blob.uri,
            "size": blob.size,
            "version": blob.version,
            "chunk_size": relay.chunk_size,
        }
        about = self._about(relay)
        if first:
            del about["start"]
        with self._unless_closed():
            begun = list(self._pool.map(lambda m: self._ask(relay, m, message | about), new))
            if first and any(begun):
                self._come_late(relay, message, new)

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Forgive the pool that it takes nothing any more."""
        try:
            yield
        except (RuntimeError, CancelledError):
            if not self._closed:
                raise

    def _come_late(
        self, relay: Relay, message: Mapping[str, Any], members: Sequence[Member]
    ) -> None:
        """Take no home's duty: others have begun. They have to know before anything is asked."""
        others = [s for node, s in relay.crowd.starts.items() if node != self._parts.me]
        relay.crowd.set_start(self._parts.me, late_start(others, relay.n_chunks))
        about = self._about(relay)
        list(self._pool.map(lambda member: self._ask(relay, member, {**message, **about}), members))

    def _ask(self, relay: Relay, member: Member, message: Mapping[str, Any]) -> bool:
        """Tell one; return whether it has, or reads, any of the blob."""
        try:
            said = self._parts.client.tell(member, "/v1/join", message)
            if "held" in said:
                held = unpack_flags(said["held"], relay.n_chunks)
                start = said.get("start")
                if not isinstance(start, int) or not 0 <= start < _MOST_START:
                    raise WireError("a join's answer without a start")
                relay.crowd.add(member.node, said.get("reads_origin") is True, held, start)
                relay.meet(member.node, said.get("swarm"))
            return said.get("begun") is True
        except (PeerError, WireError) as error:
            log.info("%s", error)
            self._parts.suspect(member.node, str(error))
            return False


def _spawn(target: Callable[[Any], None], argument: object) -> None:
    threading.Thread(
        target=target, args=(argument,), daemon=True, name="weightstream-joining"
    ).start()


def _swarm(relay: Relay) -> object:
    """Return what tells one taking part in a swarm from another; None: in none."""
    port = relay.swarm_port
    return (relay.carried, port) if port else None


def _parse(message: Mapping[str, Any]) -> tuple[str, Blob, int]:
    node, uri, version = (message.get(name) for name in ("node", "uri", "version"))
    size, chunk_size = message.get("size"), message.get("chunk_size")
    if not (isinstance(node, str) and isinstance(uri, str) and isinstance(version, str)):
        raise WireError("a join without names")
    if not isinstance(size, int) or not isinstance(chunk_size, int):
        raise WireError("a join without sizes")
    if not node or not version or len(node) > 256 or len(uri) > 4096 or len(version) > 1024:
        raise WireError("a join with odd names")
    if not 0 < size <= _MOST_BLOB_BYTES or chunk_size < 4096 or size // chunk_size > _MOST_CHUNKS:
        raise WireError("a join with odd sizes")
    return node, Blob(uri, size, version), chunk_size
