"""The control socket: clients who ask a supervisor one thing each, in a JSON line."""

import socket
from collections.abc import Callable
from typing import Any

from weightstream.cachefs.fuse.lines import Channel, ChannelClosed
from weightstream.cachefs.fuse.supervisor.loop import READABLE, WRITABLE, Loop

# A client sends its line at once; whoever connects and says nothing is a port scan or a mistake.
_SILENCE_S = 30.0

OnQuestion = Callable[["Client", dict[str, Any]], None]


class Client:
    """One connection: a question, and later an answer."""

    def __init__(self, loop: Loop, end: socket.socket, on_question: OnQuestion | None) -> None:
        """`on_question` is None for one whose question was heard by a predecessor."""
        self._loop = loop
        self._channel = Channel(end)
        self._on_question = on_question
        self._timer = loop.after(_SILENCE_S, self.close) if on_question else None
        self.is_open = True
        loop.watch(self.fileno, self._on_event)

    @property
    def fileno(self) -> int:
        """Return the descriptor."""
        return self._channel.fileno

    def answer(self, answer: dict[str, Any]) -> None:
        """Send the answer and hang up."""
        if not self.is_open:
            return
        try:
            self._channel.send(answer)
        except ChannelClosed:  # it did not wait
            self.close()
            return
        if self._channel.is_waiting:
            self._loop.watch(self.fileno, self._on_event, WRITABLE)
        else:
            self.close()

    def refuse(self, error: str, exit_code: int = 7) -> None:
        """Answer that it went wrong."""
        self.answer({"error": error, "exit_code": exit_code})

    def close(self) -> None:
        """Hang up."""
        if self.is_open:
            self.is_open = False
            if self._timer is not None:
                self._timer.cancel()
            self._loop.forget(self.fileno)
            self._channel.close()

    def _on_event(self, events: int) -> None:
        try:
            if events & WRITABLE:
                self._channel.flush()
                if not self._channel.is_waiting:
                    self.close()
            elif messages := self._channel.receive():
                self._ask(messages[0])
        except ChannelClosed:
            self.close()

    def _ask(self, question: dict[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        on_question, self._on_question = self._on_question, None
        if on_question is not None:
            on_question(self, question)


class Control:
    """The listening socket."""

    def __init__(self, loop: Loop, listener: socket.socket, on_question: OnQuestion) -> None:
        self._loop = loop
        self.listener = listener
        self._on_question = on_question
        listener.setblocking(False)
        loop.watch(listener.fileno(), self._accept, READABLE)

    def _accept(self, _: int) -> None:
        try:
            end, _address = self.listener.accept()
        except BlockingIOError:  # it hung up before it was answered
            return
        Client(self._loop, end, self._on_question)

    def close(self) -> None:
        """Answer nobody any more."""
        self._loop.forget(self.listener.fileno())
        self.listener.close()
