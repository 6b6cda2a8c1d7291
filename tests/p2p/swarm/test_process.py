"""The swarm's process alone, with a member that is played by hand: it outlives what is said to it.

libtorrent 2.1 frees its tables of pieces when a torrent is whole. Without hashes that happens in
the midst of `add_piece`, which goes on to read them where later blocks of the last piece had come
from a peer: a torrent of this project is never whole.
"""

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.p2p.swarm.handshake import greeted, info_hash

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fuse.supervisor.children import python
from weightstream.p2p.swarm.frames import receive, send
from weightstream.p2p.swarm.keeper import Start
from weightstream.p2p.swarm.torrent import Shape, describe

pytest.importorskip("libtorrent")

MIB = 1 << 20
BLOCK = 16 << 10
HERE, THERE = "127.0.0.2", "127.0.0.3"
_UNCHOKE, _BITFIELD, _REQUEST, _PIECE = 1, 5, 6, 7
_WAIT_S = 60.0


class Process:
    """A swarm's process, spoken to as the agent does."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            self.child = subprocess.Popen(
                python("weightstream.p2p.swarm.process", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
            )
        self._sock.settimeout(_WAIT_S)
        self.tell(asdict(Start(f"{HERE}:0")))
        self.port = int(self.hear("ready")["port"])
        self.tell({"op": "admit", "hosts": [THERE]})

    def tell(self, message: dict[str, Any], payload: bytes = b"") -> None:
        send(self._sock, message, payload)

    def hear(
        self, event: str, like: Callable[[dict[str, Any]], bool] = lambda said: True
    ) -> dict[str, Any]:
        """Return the next such event; fails when the process ends, or does not say so in time."""
        until_s = time.monotonic() + _WAIT_S
        while (got := receive(self._sock)) is not None:
            assert time.monotonic() < until_s, f"not heard in {_WAIT_S} s: {event}"
            if got[0]["event"] == event and like(got[0]):
                return got[0]
        raise AssertionError(f"the process ended: {self.child.wait(_WAIT_S)}")

    def add(self, name: str, path: Path, description: bytes, count: int = 1) -> None:
        about = {"path": str(path), "writes": True, "have": "0" * count}
        self.tell({"op": "add", "name": name, **about}, description)

    def close(self) -> None:
        self._sock.close()
        self.child.wait(_WAIT_S)


class Giver:
    """A member that has everything, and withholds the first block of each piece if told so."""

    def __init__(self, description: bytes, withholds: bool) -> None:
        self._server = socket.create_server((THERE, 0))
        self.port = int(self._server.getsockname()[1])
        self._description, self._withholds = description, withholds
        self._sock = self._server
        self._thread = threading.Thread(target=self._give, daemon=True)
        self._thread.start()

    def _give(self) -> None:
        with suppress(OSError):
            self._sock, _ = self._server.accept()
            with self._sock as sock:
                sock.settimeout(_WAIT_S)
                greeted(sock, info_hash(self._description))
                flags = all_of(n_pieces(self._description))
                sock.sendall(struct.pack("!IB", 1 + len(flags), _BITFIELD) + flags)
                sock.sendall(struct.pack("!IB", 1, _UNCHOKE))
                self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as said:
            while len(head := said.read(4)) == 4:
                message = said.read(struct.unpack("!I", head)[0])
                if message[:1] == bytes([_REQUEST]):
                    piece, at, count = struct.unpack("!III", message[1:])
                    if at or not self._withholds:
                        told = struct.pack("!IBII", 9 + count, _PIECE, piece, at)
                        sock.sendall(told + b"w" * count)

    def close(self) -> None:
        for sock in (self._server, self._sock):
            with suppress(OSError):  # not connected, or not any more
                sock.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(_WAIT_S)


def n_pieces(description: bytes) -> int:
    """Return of how many pieces a torrent is."""
    at = description.index(b"6:pieces") + len(b"6:pieces")
    return int(description[at:].partition(b":")[0]) // 20


def all_of(count: int) -> bytes:
    """Return a bit for each piece."""
    n_bytes = -(-count // 8)
    return int(("1" * count).ljust(n_bytes * 8, "0"), 2).to_bytes(n_bytes, "big")


@pytest.fixture
def process() -> Iterator[Process]:
    one = Process()
    yield one
    one.close()


GiverFactory = Callable[..., Giver]


@pytest.fixture
def give(process: Process, tmp_path: Path) -> Iterator[GiverFactory]:
    """Have the process want a torrent of one piece, `blob`, and know somebody who has it."""
    made: list[Giver] = []

    def make(withholds: bool = False) -> Giver:
        description = torrent_of("blob", 1)
        giver = Giver(description, withholds)
        made.append(giver)
        process.add("blob", tmp_path / "blob", description)
        process.tell({"op": "want", "name": "blob", "runs": [(0, 1)], "wanted": True})
        process.tell({"op": "connect", "name": "blob", "host": THERE, "port": giver.port})
        return giver

    yield make
    for one in made:
        one.close()


def torrent_of(word: str, count: int) -> bytes:
    shape = Shape(count * MIB, MIB)
    return describe(Blob(f"s3://models/{word}", shape.size, "v"), shape, b"k")


def test_the_last_piece_is_injected_when_most_of_it_came_from_a_peer(
    process: Process, give: GiverFactory, tmp_path: Path
) -> None:
    give(withholds=True)
    process.hear("rates", lambda said: said["moved"].get("blob", (0, 0))[0] == MIB - BLOCK)
    process.tell({"op": "piece", "name": "blob", "piece": 0}, b"w" * MIB)
    (piece,) = process.hear("pieces")["pieces"]
    assert piece == {"piece": 0, "senders": {THERE: list(range(1, MIB // BLOCK))}}
    assert (tmp_path / "blob").read_bytes() == b"w" * MIB
    process.hear("rates")
    assert process.child.poll() is None


def test_the_sender_of_every_block_is_told(process: Process, give: GiverFactory) -> None:
    give()
    (piece,) = process.hear("pieces")["pieces"]
    assert {host: sorted(blocks) for host, blocks in piece["senders"].items()} == {
        THERE: list(range(MIB // BLOCK))
    }


def test_a_torrent_that_cannot_be_is_one_that_failed(process: Process, tmp_path: Path) -> None:
    process.add("one", tmp_path / "one", torrent_of("blob", 1))
    process.add("other", tmp_path / "other", torrent_of("blob", 1))
    assert process.hear("failed")["name"] == "other"
    process.add("nonsense", tmp_path / "nonsense", b"d4:info")
    assert process.hear("failed")["name"] == "nonsense"
    assert process.hear("rates")["moved"].keys() == {"one"}
    process.tell({"op": "remove", "name": "one"})
    process.add("other", tmp_path / "other", torrent_of("blob", 1))
    process.hear("rates", lambda said: said["moved"].keys() == {"other"})


def test_the_largest_torrent_is_taken(process: Process, tmp_path: Path) -> None:
    size, chunk = ((1 << 21) - 1) * BLOCK, BLOCK
    shape = Shape(size, chunk)
    assert shape.can_be_carried
    assert not Shape(size + 1, chunk).can_be_carried
    description = describe(Blob("s3://models/large", size, "v"), shape, b"k")
    process.add("large", tmp_path / "large", description, shape.n_pieces)
    process.hear("rates", lambda said: "large" in said["moved"])
