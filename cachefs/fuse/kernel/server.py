"""The kernel driver: a few threads that read /dev/fuse and answer.

    weightstream-fuse-N     read a request; answer it, or pass on what would have to wait:
                              READ of bytes that are not here   to the content, no thread waits
                              a folder that must be listed      to weightstream-list-N
                              an open (the store's files)       to weightstream-open-N
    weightstream-notify     tells the kernel what has changed
    weightstream-care       holds requests to their deadline

A request is answered by whoever takes it out of `Waiting`. A server that ends mutes its connection
first: what it has read and not answered then is asked again of the next one.
"""

import errno
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightstream import metrics
from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import Change
from weightstream.cachefs.fuse.kernel import device, extras, handshake, wire
from weightstream.cachefs.fuse.kernel.answers import Answers, Handler
from weightstream.cachefs.fuse.kernel.connection import Connection, Refusal
from weightstream.cachefs.fuse.kernel.extras import Extras
from weightstream.cachefs.fuse.kernel.folders import Folders
from weightstream.cachefs.fuse.kernel.handshake import Negotiated
from weightstream.cachefs.fuse.kernel.journal import Journal
from weightstream.cachefs.fuse.kernel.names import ChildrenOf, Names, Owner
from weightstream.cachefs.fuse.kernel.nodes import Nodes
from weightstream.cachefs.fuse.kernel.notifier import Listing, Notifier
from weightstream.cachefs.fuse.kernel.opens import Opens
from weightstream.cachefs.fuse.kernel.passthrough import Passthrough
from weightstream.cachefs.fuse.kernel.protocol import WRITES, Notify, Op
from weightstream.cachefs.fuse.kernel.reads import Reads
from weightstream.cachefs.fuse.kernel.waiting import Waiting
from weightstream.cachefs.fuse.kernel.wire import Parts, Request

if TYPE_CHECKING:
    from weightstream.cachefs.files.content import Content
    from weightstream.cachefs.files.tree import Tree

log = logging.getLogger(__name__)

_BUFFER_BYTES = 64 << 10  # the kernel wants 8 KiB; long BATCH_FORGETs use what there is
_THREADS = 3  # beyond two, they wait for each other's interpreter lock; one may be at the disk
_CARE_S = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What a server must be told beside the tree and the content."""

    uri: str
    """Of the root, without secrets."""
    directory: str
    """Where it is mounted; only its readahead is set there."""
    store: Path | None = None
    """Where complete files lie; without it there is no passthrough."""
    journal: Path | None = None
    """What the next server must know is kept in `<journal>.nodes` and `<journal>.opens`."""
    read_ahead_bytes: int = 16 << 20
    deadline_s: float = 60.0
    passthrough: bool = True


class KernelServer:
    """Serves one connection; `start` returns at once, `ready` is set when the mount works."""

    def __init__(self, fd: int, tree: "Tree", content: "Content", options: Options) -> None:
        self._fd = fd
        self._tree = tree
        self._content = content
        self._options = options
        self.ready = threading.Event()
        self.ended = threading.Event()
        """Set when the file system is not mounted any more."""
        self.on_event: Callable[[], None] = lambda: None
        """Called when one of the two is set."""
        self.negotiated: Negotiated | None = None
        self._connection = Connection(fd)
        self._waiting = Waiting()
        self._nodes = Nodes(Journal(_beside(options.journal, ".nodes")))
        self._passthrough = Passthrough(fd, Journal(_beside(options.journal, ".opens")))
        self._names = Names(tree, content, self._nodes, self._passthrough.allows)
        self._folders = Folders(tree, self._nodes, self._names)
        self._opens = Opens(tree, content, self._nodes, self._names, self._passthrough)
        self._reads = Reads(self._connection, self._nodes, content, self._waiting)
        self._notifier = Notifier(self._connection, lambda path: tree.ttl_s(path) > 0)
        self._answers = Answers(
            self._connection, tree, self._nodes, self._opens, self._waiting, options.deadline_s
        )
        self._answers.use(self._handlers())
        self._counted = [metrics.FUSE_REQUESTS.labels(wire.op_name(op)) for op in range(64)]
        self._busy = [0] * _THREADS
        self._handled = [0] * _THREADS
        self._beaten: tuple[tuple[int, ...], float] = ((), time.monotonic())
        self._stopping = False

    def _handlers(self) -> dict[int, Handler]:
        others = Extras(self._options.uri, self._names, self._content, self._options.store)
        refused: dict[int, Handler] = dict.fromkeys(WRITES, _refuse_write)
        return refused | {
            Op.LOOKUP: self._names.lookup,
            Op.FORGET: self._names.forget,
            Op.BATCH_FORGET: self._names.forget,
            Op.GETATTR: self._names.getattr,
            Op.STATX: self._names.statx,
            Op.READLINK: self._names.readlink,
            Op.ACCESS: self._names.access,
            Op.OPENDIR: self._folders.opendir,
            Op.READDIR: self._folders.readdir,
            Op.READDIRPLUS: self._folders.readdirplus,
            Op.RELEASEDIR: self._folders.releasedir,
            Op.GETXATTR: others.getxattr,
            Op.LISTXATTR: others.listxattr,
            Op.STATFS: others.statfs,
            Op.RELEASE: lambda request, _: self._opens.release(request),
            Op.INIT: self._init,
            Op.DESTROY: lambda request, _: [],
        }

    # ---- life

    def start(self, resume: Mapping[str, Any] | None = None) -> None:
        """Serve; `resume` is what an earlier server of the same connection negotiated."""
        os.set_blocking(self._fd, True)
        self._content.on_complete = self.completed
        if resume is None:
            self._nodes.begin()
            self._passthrough.begin()
        else:
            self._resume(Negotiated.from_json(resume))
        # What an earlier server read and did not answer comes again; before anything new is read.
        self._connection.notify(Notify.RESEND)
        threading.Thread(target=self._care, daemon=True, name="weightstream-care").start()
        for number in range(_THREADS if self.negotiated else 1):
            self._start_thread(number)

    def _resume(self, negotiated: Negotiated) -> None:
        self._nodes.load()
        handles = self._passthrough.load()
        self._agree(negotiated)
        self._opens.adopt(handles)
        self._set_ready()

    def _start_thread(self, number: int) -> None:
        name = f"weightstream-fuse-{number}"
        threading.Thread(target=self._serve, args=(number,), daemon=True, name=name).start()

    def stop(self) -> None:
        """Answer and say nothing from now on; the next server is asked what is not answered."""
        self._stopping = True
        self._notifier.disarm()
        self._connection.is_muted = True

    def is_healthy(self, longest_s: float = 20.0) -> bool:
        """Say whether requests get anywhere: not if all threads are inside one for so long."""
        now = time.monotonic()
        counts = tuple(self._handled)
        if counts != self._beaten[0] or not all(self._busy):
            self._beaten = (counts, now)
        return now - self._beaten[1] < longest_s

    def init(self) -> dict[str, Any]:
        """Return what the next server must know of the connection."""
        assert self.negotiated is not None
        return self.negotiated.to_json()

    def gauges(self) -> dict[str, int]:
        """Return what is open and what waits."""
        return {
            **self._content.gauges(),
            "open_files": len(self._opens),
            "open_folders": len(self._folders),
            "passthrough_files": len(self._passthrough),
            "waiting_requests": len(self._waiting),
            "listings": self._answers.listings(),
        }

    # ---- news

    def changed(self, changes: Sequence[Change]) -> None:
        """Hear from the tree that names lead to something else now."""
        folders = dict.fromkeys(change.folder for change in changes)
        self._notifier.tell([*changes, *map(Listing, folders)])

    def completed(self, blob: Blob) -> None:
        """Hear from the content that a file is complete: its name leads to another node now."""
        file = self._nodes.completed(blob.id)
        if file is not None and self._passthrough.enabled:
            metrics.FUSE_SWITCHES.inc()
            self._notifier.tell([Change(file.folder, file.name)])

    def settle(self, longest_s: float) -> bool:
        """Wait until the kernel has been told all news."""
        return self._notifier.settle(longest_s)

    # ---- requests

    def _serve(self, number: int) -> None:
        buffer = bytearray(_BUFFER_BYTES)
        view = memoryview(buffer)
        while (length := self._read(buffer)) and not self._stopping:
            self._busy[number] = 1
            try:
                self._dispatch(view, length)
            except Exception:  # a bug in what reports bugs; the thread must go on
                log.exception("unexpected, serving a request")
            self._busy[number] = 0
            self._handled[number] += 1

    def _read(self, buffer: bytearray) -> int:
        """Return the length of the next request; 0 at the end."""
        while True:
            try:
                return os.readv(self._fd, [buffer])
            except OSError as error:
                if device.is_gone(error):
                    self._end(error)
                    return 0
                if error.errno == errno.EAGAIN:
                    select.select([self._fd], [], [])
                # else ENOENT: the request was interrupted before it was read

    def _end(self, error: OSError) -> None:
        log.debug("not mounted any more: %s", error)
        self.ended.set()
        self.on_event()

    def _dispatch(self, view: memoryview, length: int) -> None:
        opcode = int.from_bytes(view[4:8], sys.byteorder)
        self._counted[opcode & 63].inc()
        if self.negotiated is None and opcode != Op.INIT:
            self._agree_late()
        if opcode == Op.READ and length >= wire.READ_REQUEST.size:
            fields = wire.READ_REQUEST.unpack_from(view)
            self._reads.serve(fields[2], fields[3], fields[10], fields[11], fields[14])
            return
        if opcode == Op.GETXATTR and extras.is_foreign(view[:length]):
            self._connection.say_unsupported(int.from_bytes(view[8:16], sys.byteorder))
            return
        try:
            request = wire.parse_request(view[:length])
        except wire.WireError as error:  # not even whom to answer is sure
            log.warning("%s", error)
            return
        self._answers.answer(request)

    def _care(self) -> None:
        while not self._stopping:
            time.sleep(_CARE_S)
            self._waiting.expire(time.monotonic())

    # ---- INIT

    def _init(self, request: Request, _: ChildrenOf) -> None:
        offer = wire.offer_of(request)
        answer = handshake.answer(offer, self._stack_depth())
        if not self._connection.reply(request.unique, [wire.init_out(answer)]):
            return
        self._agree(Negotiated(answer.minor, self._probe(), time.time_ns()))
        log.info("agreed with the kernel on protocol 7.%d: %#x", answer.minor, answer.flags)
        self._go_on()

    def _agree_late(self) -> None:
        """Go on where an earlier server answered INIT and was killed before it could say so."""
        self._agree(Negotiated(wire.MINOR, self._probe(), time.time_ns()))
        self._go_on()

    def _go_on(self) -> None:
        self._set_ready()
        for number in range(1, _THREADS):
            self._start_thread(number)

    def _agree(self, negotiated: Negotiated) -> None:
        self.negotiated = negotiated
        self._passthrough.enabled = negotiated.passthrough
        self._names.owner = Owner(os.getuid(), os.getgid(), negotiated.mounted_ns)

    def _set_ready(self) -> None:
        self.ready.set()
        self.on_event()
        options = self._options
        set_up = threading.Thread(
            target=device.set_read_ahead,
            args=(options.directory, options.read_ahead_bytes),
            daemon=True,
            name="weightstream-set-up",
        )
        set_up.start()

    def _stack_depth(self) -> int | None:
        if self._options.store is None or not self._options.passthrough:
            return None
        return device.stack_depth(self._options.store)

    def _probe(self) -> bool:
        """Say whether files of the store can be passed through, by trying."""
        if self._options.store is None or not self._options.passthrough:
            return False
        error = device.passthrough_refused(self._fd, self._options.store)
        if error is not None:
            log.info("no passthrough, complete files are read through the server: %s", error)
        return error is None


def _refuse_write(request: Request, _: ChildrenOf) -> Parts:
    raise Refusal(errno.EROFS)


def _beside(path: Path | None, suffix: str) -> Path | None:
    return None if path is None else path.with_name(path.name + suffix)
