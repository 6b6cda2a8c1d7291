"""The swarm's process: `python -m weightstream.p2p.swarm.process DESCRIPTOR`, by the agent.

A process, because libtorrent may crash and has one network thread: neither is to be the agent's.
It ends when the agent's end of the socket is closed, however that came.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import time

from weightstream.p2p.swarm.frames import Message, receive, send
from weightstream.p2p.swarm.session import Session

_LOOK_S = 0.1
_MOST_ADDING = 64
"""Pieces on their way into files; libtorrent keeps them in memory. More, and the agent waits."""
_ADDING_S = 2.0


def main() -> None:
    """Run until the agent is gone."""
    faulthandler.enable()  # a native crash says where it was, in the agent's log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the agent
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        first = receive(sock)
        if first is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _serve(sock, first[0])
    os._exit(0)  # no torrent is worth waiting for


def _serve(sock: socket.socket, start: Message) -> None:
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    session = Session(start, wake)
    full_since_s = 0.0
    while True:
        is_full = session.adding >= _MOST_ADDING
        full_since_s = (full_since_s or time.monotonic()) if is_full else 0.0
        if is_full and time.monotonic() - full_since_s > _ADDING_S:
            session.forget_adding()
        waited = [woken] if is_full else [woken, sock.fileno()]
        ready, _, _ = select.select(waited, [], [], _LOOK_S)
        if woken in ready:
            os.read(woken, 4096)
        if sock.fileno() in ready:
            got = receive(sock)
            if got is None:
                return
            session.do(*got)
        for told in session.news():
            send(sock, told)


if __name__ == "__main__":
    main()
