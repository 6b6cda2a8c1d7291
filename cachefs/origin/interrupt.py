"""Breaking a transfer off from another thread."""

import socket
import threading


class Interrupt:
    """Shuts down whichever socket a transfer is on at that moment. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.fired = False

    def fire(self) -> None:
        """Shut the socket down: the thread that reads from it wakes at once."""
        with self._lock:
            self.fired = True
            if self._sock is not None:
                _shut_down(self._sock)

    def watch(self, sock: socket.socket | None) -> None:
        """Name the socket that is used from now on; None when there is none."""
        with self._lock:
            self._sock = sock
            if self.fired and sock is not None:
                _shut_down(sock)


def _shut_down(sock: socket.socket) -> None:
    # The base class's method on purpose: SSLSocket.shutdown() drops the TLS state first, and a read
    # that is under way on the other thread would go on with ciphertext taken for content.
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # closed already: nobody waits on it
