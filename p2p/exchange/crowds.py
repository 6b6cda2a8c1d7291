"""Who loads or holds a blob, and which chunks each is known to have."""

import base64
import threading
from collections.abc import Iterator, Mapping

from weightstream.p2p.exchange.wire import WireError
from weightstream.p2p.schedule import Homes, View, standing

_MESH = 16
"""Up to so many nodes ask each home themselves; more pass chunks down trees."""
_FAN_OUT = 3


class _Holders(Mapping[int, frozenset[str]]):
    """By chunk, who has it: looked up when asked, from a flag per node and chunk."""

    def __init__(self, flags: Mapping[str, bytearray]) -> None:
        self._flags = flags

    def __getitem__(self, chunk: int) -> frozenset[str]:
        return frozenset(node for node, flags in tuple(self._flags.items()) if flags[chunk])

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class Crowd:
    """The crowd of one blob as one node sees it. Thread-safe."""

    def __init__(self, me: str, reads_origin: bool, blob_id: str, n_chunks: int) -> None:
        self._me = me
        self._reads_origin = reads_origin
        self._blob_id = blob_id
        self._n_chunks = n_chunks
        self._lock = threading.Lock()
        self._homes = Homes((me,))
        self._starts: dict[str, int] = {me: 0}
        self._flags: dict[str, bytearray] = {}
        self._moved: dict[int, str] = {}
        self.is_refuted = False
        self.epoch = 0
        """Changes whenever homes do, or a chunk is taken over."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Return who reads from the origin, this node included."""
        return self._homes.order

    @property
    def holders(self) -> tuple[str, ...]:
        """Return who is known to have a chunk."""
        return tuple(node for node, flags in tuple(self._flags.items()) if any(flags))

    def having(self, chunk: int) -> frozenset[str]:
        """Return who is known to have a chunk."""
        return _Holders(self._flags)[chunk]

    def home(self, chunk: int) -> str:
        """Return who reads a chunk from the origin when nobody is down or slow."""
        return self._homes.home(chunk)

    def rank(self, chunk: int) -> tuple[str, ...]:
        """Return all who read from the origin as they stand in for each other: the home first."""
        return self._homes.rank(chunk)

    @property
    def starts(self) -> Mapping[str, int]:
        """Return from which chunk on each node may be home, by node; see `Homes`."""
        with self._lock:
            return dict(self._starts)

    def set_start(self, node: str, start: int) -> None:
        """Hear from which chunk on a node may be home."""
        with self._lock:
            if self._starts.get(node) != start:
                self._starts[node] = start
                self._draw()

    def add(self, node: str, reads_origin: bool, held: bytes, start: int) -> None:
        """Take a node in, or hear more of it."""
        with self._lock:
            flags = self._flags.setdefault(node, bytearray(self._n_chunks))
            for i, has in enumerate(held):
                if has:
                    flags[i] = 1
            if reads_origin and self._starts.get(node) != start:
                self._starts[node] = start
                self._draw()

    def remove(self, node: str) -> None:
        """Forget a node."""
        with self._lock:
            self._flags.pop(node, None)
            if node != self._me and self._starts.pop(node, None) is not None:
                self._draw()

    def _draw(self) -> None:
        """Make the homes anew; the lock is held."""
        others = [node for node in self._starts if node != self._me]
        nodes = tuple(self._starts) if self._reads_origin or not others else others
        order = standing(self._blob_id, nodes)
        starts = tuple(self._starts[node] for node in order)
        self._homes = Homes(order, starts if any(starts) else ())
        self.epoch += 1

    def move(self, chunk: int, taker: str) -> None:
        """Hear that a chunk of this node was taken over, or that this node takes it."""
        with self._lock:
            self._moved[chunk] = taker
            self.epoch += 1

    def refute(self) -> None:
        """Trust nobody with this blob any more."""
        with self._lock:
            self.is_refuted = True
            self.epoch += 1

    def taker(self, chunk: int) -> str | None:
        """Return who has taken a chunk over."""
        return self._moved.get(chunk)

    @property
    def is_founded_here(self) -> bool:
        """Say that this node was there when the first byte was read: it may be home."""
        return not self._homes.starts_at(self._me)

    @property
    def is_mesh(self) -> bool:
        """Say that everybody asks a chunk's home; else chunks go down trees."""
        return len(self._homes.order) <= _MESH

    def note(self, node: str, chunk: int, has: bool) -> None:
        """Hear that a node has a chunk, or has not."""
        flags = self._flags.get(node)
        if flags is not None:
            flags[chunk] = has

    def view(
        self,
        down: frozenset[str],
        slow: frozenset[str],
        zones: Mapping[str, str],
        urgent: bool = False,
        left: frozenset[str] = frozenset(),
    ) -> View:
        """Return what the schedule decides by; who was `left` is passed over by all means.

        In a mesh, bulk asks a home that is slow as well: what it has not begun others take over
        from it, and nothing is read twice. Who came late, asks one node for everything, and a
        reader that waits, pass a slow one over.
        """
        if self.is_refuted:
            return View(self._me, Homes((self._me,)))
        fan_out = None if self.is_mesh else _FAN_OUT
        if self.is_mesh and self.is_founded_here and not urgent:
            slow = frozenset()
        holders = _Holders(self._flags)
        return View(self._me, self._homes, holders, down, slow | left, zones, fan_out, self._moved)


def pack_flags(flags: bytes) -> str:
    """Return a byte per chunk as base64 of a bit per chunk."""
    bits = bytearray(-(-len(flags) // 8))
    for i, flag in enumerate(flags):
        if flag:
            bits[i // 8] |= 1 << i % 8
    return base64.b64encode(bits).decode()


def unpack_flags(text: object, count: int) -> bytes:
    """Return what `pack_flags` packed; WireError for anything else."""
    if not isinstance(text, str) or len(text) > 4 * (count // 24 + 2):
        raise WireError("bad chunk flags")
    try:
        bits = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise WireError("bad chunk flags") from error
    if len(bits) != -(-count // 8):
        raise WireError("bad chunk flags")
    return bytes(bits[i // 8] >> i % 8 & 1 for i in range(count))
