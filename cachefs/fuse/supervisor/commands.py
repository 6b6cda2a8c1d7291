"""What a supervisor does for those who ask at its control socket.

`status`, `umount` and `upgrade` are the supervisor's own; anything else is forwarded to the server,
so that a new question to servers needs no new supervisor.
"""

import itertools
import socket
from collections.abc import Callable
from typing import Any, Protocol

from weightstream.cachefs.fuse.mount_table import cannot_unmount
from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.cachefs.fuse.supervisor.attachment import Attachment
from weightstream.cachefs.fuse.supervisor.control import Client, Control
from weightstream.cachefs.fuse.supervisor.handover import Handover, Job
from weightstream.cachefs.fuse.supervisor.loop import Loop
from weightstream.cachefs.fuse.supervisor.mount_log import MountLog
from weightstream.cachefs.fuse.supervisor.server_process import Server
from weightstream.errors import MountBusyError

# `mounts` asks every mount; a server that is busy has its gauges left out.
_STATUS_S = 1.0
# Others wait as long as they like: a refresh of a large tree takes its time. This only bounds what
# a server that forgets to answer costs.
_ANSWER_S = 900.0

Then = Callable[[dict[str, Any]], None]


class Supervised(Protocol):
    """What is commanded: a supervisor."""

    job: Job
    loop: Loop
    lock: int
    run: RunDirectory
    log: MountLog
    attachment: Attachment
    init: dict[str, Any]
    restarts: int
    mounted_at_s: float

    @property
    def current(self) -> Server | None:
        """Return the server that serves."""

    @property
    def is_settled(self) -> bool:
        """Return whether a server serves and no other is to come."""
        ...

    def report(self) -> dict[str, Any]:
        """Return what `mounts` shows."""
        ...

    def stop(self, force: bool = False) -> None:
        """End the mount, and then the process."""


class Commands:
    """The control socket of one mount."""

    def __init__(self, owner: Supervised, handover: Handover | None) -> None:
        self._owner = owner
        self._numbers = itertools.count(1)
        self._pending: dict[int, Then] = {}
        self._upgrader: Client | None = None
        directory = owner.job.spec.directory
        if handover is None:
            listener = owner.run.listen(directory)
        else:
            listener = socket.socket(fileno=handover.listener)
            if handover.client >= 0:
                end = socket.socket(fileno=handover.client)
                self._upgrader = Client(owner.loop, end, None)
        self._control = Control(owner.loop, listener, self._on_question)

    @property
    def listener(self) -> int:
        """Return the descriptor of the control socket."""
        return self._control.listener.fileno()

    def close(self) -> None:
        """Answer nobody any more."""
        self._control.close()
        self.upgrade_failed("the mount has ended")

    def on_answer(self, answer: dict[str, Any]) -> None:
        """Pass a server's answer on."""
        then = self._pending.pop(int(answer.pop("id")), None)
        if then is not None:
            then(answer)

    def on_server_exit(self) -> None:
        """Answer for a server that ended."""
        pending, self._pending = self._pending, {}
        for then in pending.values():
            then({"error": "the server ended before it answered", "exit_code": 7})

    def upgraded(self) -> None:
        """Tell who asked for an upgrade that the new server serves."""
        client, self._upgrader = self._upgrader, None
        if client is not None:
            client.answer(self._owner.report())

    def upgrade_failed(self, error: str) -> None:
        """Tell who asked for an upgrade that nothing has changed."""
        client, self._upgrader = self._upgrader, None
        if client is not None:
            client.refuse(error)

    def _on_question(self, client: Client, question: dict[str, Any]) -> None:
        command = question.get("command")
        if command == "status":
            self._status(client)
        elif command == "umount":
            self._umount(client, question)
        elif command == "upgrade":
            self._upgrade(client, question)
        else:
            self._forward(question, client.answer, _ANSWER_S)

    def _status(self, client: Client) -> None:
        report = self._owner.report()

        def then(answer: dict[str, Any]) -> None:
            client.answer({**report, "gauges": answer.get("gauges", {})})

        self._forward({"command": "status"}, then, _STATUS_S)

    def _umount(self, client: Client, question: dict[str, Any]) -> None:
        owner = self._owner
        if question.get("force"):
            client.answer({"unmounted": True})
            owner.stop(force=True)
            return
        lazy = bool(question.get("lazy"))
        try:
            owner.attachment.detach(lazy)
        except OSError as error:
            why_not = cannot_unmount(owner.job.spec.directory, error)
            busy = isinstance(why_not, MountBusyError)
            client.answer({"error": str(why_not), "exit_code": why_not.exit_code, "busy": busy})
            return
        owner.log(f"{owner.job.spec.directory} unmounted on request")
        client.answer({"unmounted": True})
        # Unmounted lazily, it is served on for those who have files open; when the last of them is
        # closed the server hears it from the kernel and ends, and the supervisor with it.
        if not lazy or not owner.attachment.is_alive():
            owner.stop()

    def _upgrade(self, client: Client, question: dict[str, Any]) -> None:
        from weightstream.cachefs.fuse.supervisor.upgrade import Upgrade

        if not self._owner.is_settled or self._upgrader is not None:
            client.refuse("its server is being replaced just now; try again when it is ready")
            return
        self._upgrader = client
        Upgrade(self._owner, self, client, str(question.get("python") or "")).begin()

    def _forward(self, question: dict[str, Any], then: Then, limit_s: float) -> None:
        server = self._owner.current
        if server is None or server.phase != "ready":
            then({"error": "no server runs just now; try again", "exit_code": 7})
            return
        number = next(self._numbers)
        self._pending[number] = then

        def give_up() -> None:
            late = self._pending.pop(number, None)
            if late is not None:
                late({"error": f"the server did not answer for {limit_s:g} s", "exit_code": 7})

        self._owner.loop.after(limit_s, give_up)
        server.send({**question, "id": number})
