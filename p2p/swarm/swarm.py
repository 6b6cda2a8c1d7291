"""The swarm of a node: every cargo, one process, one thread that looks after them."""

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from weightstream import metrics
from weightstream.errors import UsageError
from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.identity import PEER_NAME, Identity
from weightstream.p2p.members import Member
from weightstream.p2p.swarm.addresses import Addresses
from weightstream.p2p.swarm.cargo import MOST_SUPPLIED_BYTES, Cargo
from weightstream.p2p.swarm.checking import Checker
from weightstream.p2p.swarm.frames import Message
from weightstream.p2p.swarm.keeper import Keeper, Start
from weightstream.p2p.swarm.policy import Verdict, friends, verdict
from weightstream.p2p.swarm.scratch import Scratch
from weightstream.p2p.swarm.torrent import Shape, describe
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_LOOK_S = 0.1


class Swarm:
    """Satisfies `Carrier`. Thread-safe; close it."""

    def __init__(self, settings: Settings, identity: Identity) -> None:
        """Raises `WeightstreamError` when it cannot listen, or has no place for its files."""
        self._me = identity.node
        self._key = identity.key("swarm")
        self._min_free_bytes = int(settings.store_min_free_bytes)
        self._lock = threading.Lock()
        self._checkers: dict[str, Checker] = {}
        self._addresses = Addresses()
        self._hosts: Mapping[str, tuple[str, ...]] = {}
        """By member, where it is."""
        self._admitted: frozenset[str] = frozenset()
        self._connected: set[tuple[Cargo, str, int]] = set()
        self._strikes: dict[str, set[tuple[str, int]]] = {}
        self._left_out: set[str] = set()
        self._woken = threading.Event()
        self._closed = False
        self._scratch = Scratch(settings.store)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="weightstream-swarm")
        try:
            self._keeper = Keeper(_start(settings, identity), self._hear, self._changed)
        except BaseException:
            self._scratch.close()
            raise
        self._thread = threading.Thread(target=self._run, daemon=True, name="weightstream-swarm")
        self._thread.start()

    @property
    def port(self) -> int:
        """See `Carrier`."""
        return self._keeper.port if self._keeper.is_up else 0

    @property
    def pid(self) -> int:
        """Return the process that runs libtorrent."""
        return self._keeper.pid

    def carry(self, relay: Relay) -> Cargo | None:
        """See `Carrier`. A blob that is whole in the store is given from there; one of which a
        large part is there is not carried: the exchange serves it where it lies."""
        shape = Shape(relay.blob.size, relay.chunk_size)
        if self._closed or not shape.can_be_carried:
            return None
        stored = relay.stored_path()
        if stored is None and not self._has_room(relay):
            return None
        path = stored or self._scratch.path / f"{relay.blob.id}.part"
        description = describe(relay.blob, shape, self._key)
        cargo = Cargo(relay, shape, path, stored is None, description, self._keeper)
        with self._lock:
            self._checkers[relay.blob.id] = Checker(cargo, self._pool, self._blame)
        self._woken.set()
        return cargo

    def _has_room(self, relay: Relay) -> bool:
        """Say whether a copy of a blob may lie on the disk, and what the store has go into it."""
        if len(relay.stored_chunks()) * relay.chunk_size > MOST_SUPPLIED_BYTES:
            return False
        free_bytes = shutil.disk_usage(self._scratch.path).free - relay.blob.size
        if free_bytes < self._min_free_bytes:
            log.info("no room for %s in the swarm: it goes over the exchange", relay.blob.uri)
        return free_bytes >= self._min_free_bytes

    def close(self) -> None:
        """End it; the exchange goes on alone."""
        self._closed = True
        self._woken.set()
        self._keeper.close()
        for checker in self._all():
            checker.close()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        self._scratch.close()

    # What the process says

    def _hear(self, said: Message) -> None:
        if said["event"] == "rates":
            for name, moved in said["moved"].items():
                if (checker := self._checkers.get(name)) is not None:
                    checker.cargo.moved(*moved)
            return
        checker = self._checkers.get(str(said.get("name")))
        if checker is None:
            return
        if said["event"] == "failed":
            checker.cargo.fail(said["why"])
        elif said["event"] == "pieces" and checker.cargo.pieces(said["pieces"]):
            self._woken.set()

    def _changed(self) -> None:
        """The process died, or runs again and knows of nothing."""
        if self._keeper.is_up:
            self._admitted = frozenset()
            self._connected = set()
            for checker in self._all():
                checker.cargo.add()
        self._woken.set()

    # Its thread

    def _run(self) -> None:
        while not self._closed:
            self._woken.wait(_LOOK_S if self._checkers else None)
            self._woken.clear()
            checkers = self._all()
            try:
                if checkers:
                    self._admit(checkers[0].cargo.relay.alive())
                for checker in checkers:
                    self._look_after(checker)
            except Exception:
                log.exception("unexpected, in the swarm")

    def _look_after(self, checker: Checker) -> None:
        cargo = checker.cargo
        if cargo.is_closed:
            self._drop(cargo)
            return
        cargo.look()
        cargo.supply()
        try:
            checker.step()
        except OSError as error:  # not its file any more, or the disk fails
            cargo.fail(str(error))
        for node in friends(self._me, [node for node in tuple(cargo.met) if node in self._hosts]):
            key = cargo, node, cargo.met[node]
            if key not in self._connected and self._hosts[node]:
                self._connected.add(key)
                cargo.connect(self._hosts[node][0], cargo.met[node])

    def _admit(self, alive: Mapping[str, Member]) -> None:
        """Tell the process with whom it may talk."""
        now_s = time.monotonic()
        self._hosts = {node: self._addresses.of(member, now_s) for node, member in alive.items()}
        admitted = self._addresses.admitted(alive.values(), now_s) - self._left_out
        if admitted != self._admitted:
            told = {"op": "admit", "hosts": sorted(admitted)}
            self._admitted = admitted if self._keeper.tell(told) else frozenset()

    def _drop(self, cargo: Cargo) -> None:
        with self._lock:
            checker = self._checkers.get(cargo.relay.blob.id)
            if checker is not None and checker.cargo is cargo:
                del self._checkers[cargo.relay.blob.id]
            self._connected = {key for key in self._connected if key[0] is not cargo}

    def _all(self) -> list[Checker]:
        with self._lock:
            return list(self._checkers.values())

    # Who sends wrong bytes

    def _blame(self, relay: Relay, chunk: int, host: str) -> None:
        metrics.PEER_FAILURES.labels("wrong").inc()
        if host in self._left_out:
            return
        strikes = self._strikes.setdefault(host, set())
        strikes.add((relay.blob.id, chunk))
        node = self._node_at(relay, host)
        stands_by = bool(node) and self._stands_by(relay, node, chunk)
        what = f"peer {node or host} sent wrong bytes of {relay.blob.uri} {relay.chunk(chunk)}"
        match verdict(stands_by, len(strikes)):
            case Verdict.NOTHING:
                log.info("%s, and does not stand by them", what)
                return
            case Verdict.LEFT_OUT:
                log.warning("%s: left out of the swarm", what)
            case Verdict.BANNED:
                relay.ban(node)
                log.warning("%s: not asked again", what)
        self._left_out.add(host)
        self._woken.set()

    def _node_at(self, relay: Relay, host: str) -> str:
        """Return the only member at an address; empty where there are several, or none now."""
        nodes = [node for node, hosts in self._hosts.items() if host in hosts]
        return nodes[0] if len(nodes) == 1 and nodes[0] in relay.alive() else ""

    @staticmethod
    def _stands_by(relay: Relay, node: str, chunk: int) -> bool:
        try:
            return chunk in relay.ask_digests(node, [chunk]).stands_by
        except PeerError as error:
            log.info("%s", error)
            return False


def open_swarm(settings: Settings, identity: Identity) -> Swarm | None:
    """Return the swarm, if the settings choose it; raises `UsageError` where it cannot be."""
    if settings.peer_transport != "swarm":
        return None
    if find_spec("libtorrent") is None:
        raise UsageError(
            "peer_transport swarm needs the package libtorrent: pip install 'weightstream[p2p]'"
        )
    if not Shape(1, settings.chunk_size).can_be_carried:
        raise UsageError("peer_transport swarm needs a chunk_size that is a multiple of 16 KiB")
    return Swarm(settings, identity)


def _start(settings: Settings, identity: Identity) -> Start:
    if identity.server_context() is None:
        return Start(settings.swarm_listen)
    own = identity.credentials(PEER_NAME)
    pem = (own.authority.decode(), own.certificate.decode(), own.private_key.decode())
    return Start(settings.swarm_listen, *pem)
