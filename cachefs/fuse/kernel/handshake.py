"""INIT: what is taken of the kernel's offer, and why."""

import errno
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weightstream.cachefs.fuse.kernel.connection import Refusal
from weightstream.cachefs.fuse.kernel.protocol import Init
from weightstream.cachefs.fuse.kernel.wire import MAJOR, MINOR, OLDEST_MINOR, Answer, Offer

# Not taken: WRITEBACK_CACHE switches passthrough off; AUTO_INVAL_DATA drops pages of files whose
# bytes never change.
_WANTED = (
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.DO_READDIRPLUS
    | Init.PARALLEL_DIROPS
    | Init.ABORT_ERROR
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.EXPLICIT_INVAL_DATA
    | Init.INIT_EXT  # without it the kernel ignores all that follow
    | Init.DIRECT_IO_ALLOW_MMAP
    | Init.PASSTHROUGH
    | Init.HAS_RESEND
    | Init.ALLOW_IDMAP
)
_LIFTED_READ_AHEAD_BYTES = 1 << 30  # the kernel takes the lower of this and its own
_MAX_PAGES = 4096  # 16 MiB; the kernel takes the lower of this and fs.fuse.max_pages_limit
_MAX_WRITE_BYTES = 4096  # nothing is written; the buffer for requests can stay small

# Reads beyond this many wait in the kernel, also those whose bytes are here: with 64 threads that
# fault in parts that are not, a low limit would hold up everybody else. A waiting read costs the
# server a list entry.
_MAX_BACKGROUND = 1024


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What holds for a connection, for this server and the next."""

    minor: int
    passthrough: bool
    mounted_ns: int

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Negotiated":
        """Make it of what an earlier server said; what that one did not know is off."""
        return cls(
            int(values.get("minor", MINOR)),
            bool(values.get("passthrough", False)),
            int(values.get("mounted_ns", 0)),
        )


def answer(offer: Offer, max_stack_depth: int | None) -> Answer:
    """Return the answer to INIT; no stack depth: passthrough is not wanted.

    Raises `Refusal` for a kernel that is too old.
    """
    if offer.major < MAJOR or (offer.major == MAJOR and offer.minor < OLDEST_MINOR):
        raise Refusal(errno.EPROTO)
    flags = offer.flags & _WANTED
    if max_stack_depth is None:
        flags &= ~Init.PASSTHROUGH
    return Answer(
        minor=min(offer.minor, MINOR),
        flags=flags,
        max_readahead=_LIFTED_READ_AHEAD_BYTES,
        max_background=_MAX_BACKGROUND,
        congestion=_MAX_BACKGROUND * 3 // 4,
        max_write=_MAX_WRITE_BYTES,
        max_pages=_MAX_PAGES,
        max_stack_depth=max_stack_depth if flags & Init.PASSTHROUGH and max_stack_depth else 0,
    )
