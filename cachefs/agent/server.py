"""The agent's data socket: who may connect, a thread for each connection, and the pulse of all.

Blocking sockets and threads, as the origin's data plane has them: the work of a range is the
kernel's copy from the network into shared memory, and this is a frame of eight bytes per MiB.
"""

import logging
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.arena import Arena
from weightstream.cachefs.agent.finding import SOCKET
from weightstream.cachefs.agent.serving import Connection, Reads

log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 512


class DataServer:
    """Serves ranges to the processes of this node. Thread-safe; `close` it."""

    def __init__(self, directory: Path, arena: Arena | None, reads: Reads) -> None:
        self._arena = arena
        self._reads = reads
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._closing = threading.Event()
        self._listener = listen(directory, SOCKET)
        for work in (self._accept, self._pulse):
            threading.Thread(target=work, daemon=True, name="weightstream-agent").start()

    @property
    def connections(self) -> int:
        """Return how many clients are connected."""
        return len(self._connections)

    def close(self) -> None:
        """Take nobody in any more, and end what runs: clients read on from the origin."""
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cancel()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closing.wait(0.1):  # out of descriptors, most likely
                    log.debug("no connection taken: %s", error)
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        pid, uid = wire.peer(sock)
        if not wire.is_trusted(uid) or len(self._connections) >= _MOST_CONNECTIONS:
            log.info("process %d of user %d is not served", pid, uid)
            sock.close()
            return
        connection = Connection(sock, self._arena, self._reads)
        with self._lock:
            self._connections.add(connection)
        try:
            threading.Thread(
                target=self._serve, args=(connection,), daemon=True, name="weightstream-client"
            ).start()
        except RuntimeError as error:  # a limit on threads
            log.info("process %d is not served: %s", pid, error)
            self._end(connection)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _pulse(self) -> None:
        """Tell those who wait for bytes that we live; notice those who have died."""
        while not self._closing.wait(wire.BEAT_S):
            with self._lock:
                connections = list(self._connections)
            for connection in connections:
                connection.beat()


def listen(directory: Path, name: str) -> socket.socket:
    """Return a listening socket for this user alone; replaces one that a dead agent left."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with wire.socket_address(directory, name) as path:
            with suppress(FileNotFoundError):
                os.unlink(path)
            before = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(before)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener
