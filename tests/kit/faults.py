"""What can go wrong between a client and an origin, as data: which requests, and what befalls them.

    proxy.add(When(key="model-00001", ranged=True, nth=2), Reset(after_bytes=100_000))

Several rules may match one request; all of them apply. The first one that answers (`Status`,
`Redirect`, `Drop`) wins.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.kit.wire import Request


@dataclass(frozen=True, slots=True)
class When:
    """Which requests: every given condition holds. `nth` counts matching requests from 1."""

    key: str = ""
    """A part of the path (`/bucket/key`)."""
    method: str = ""
    ranged: bool | None = None
    """True: only requests with a range; False: only those without."""
    covers: int | None = None
    """Only ranges that hold this byte."""
    where: Callable[[Request], bool] | None = None
    nth: int = 1
    """The first matching request that is hit."""
    times: int | None = 1
    """How many matching requests from there on; None: all."""

    def matches(self, request: Request) -> bool:
        """Say whether the conditions hold, the count aside."""
        span = request.range
        return (
            self.key in request.path
            and self.method in ("", request.method)
            and self.ranged in (None, span is not None)
            and (self.covers is None or (span is not None and span[0] <= self.covers < span[1]))
            and (self.where is None or self.where(request))
        )

    def hits(self, seen: int) -> bool:
        """Say whether the `seen`-th matching request (from 1) is hit."""
        return seen >= self.nth and (self.times is None or seen < self.nth + self.times)


ALWAYS = When(times=None)


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with an S3 error document instead of asking the server."""

    status: int
    code: str = ""
    message: str = "injected"
    retry_after_s: int | str | None = None


SLOW_DOWN = Status(503, "SlowDown", "Please reduce your request rate.")
EXPIRED_TOKEN = Status(400, "ExpiredToken", "The provided token has expired.")
FORBIDDEN = Status(403, "AccessDenied", "Access Denied")
NOT_FOUND = Status(404, "NoSuchKey", "The specified key does not exist.")
CHANGED = Status(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
INTERNAL_ERROR = Status(500, "InternalError", "We encountered an internal error.")


@dataclass(frozen=True, slots=True)
class Redirect:
    """Answer 307 to another place."""

    location: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection without an answer, as a stale keep-alive connection does."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class Reset:
    """Send that many body bytes, then RST."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class ShortBody:
    """Send that many body bytes of the promised length, then close in order (FIN)."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Say another range than the body's: both ends moved, or a whole other header value."""

    shift: int = 0
    value: str | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """Say a Content-Length that is off by this much; the connection is closed after the body."""

    delta: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing for a while: before the head (None) or after so many body bytes."""

    seconds: float
    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Drip:
    """Send the body at this rate."""

    rate_bytes_s: float


@dataclass(frozen=True, slots=True)
class DripHead:
    """Send status line and headers at this rate: no silence, and no answer either."""

    rate_bytes_s: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Wait before the request goes on to the server."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Flip every bit of `count` bytes at this offset of the *object* where the body holds them."""

    at: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer 200 with the whole object, as a server without range support does."""


@dataclass(frozen=True, slots=True)
class AddHeaders:
    """Set response headers."""

    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Hook:
    """Call this before the request goes on to the server (to replace the object, kill, wait)."""

    call: Callable[[Request], None]


Fault = (
    Status
    | Redirect
    | Drop
    | Reset
    | ShortBody
    | ContentRange
    | Length
    | Stall
    | Drip
    | DripHead
    | Latency
    | Corrupt
    | IgnoreRange
    | AddHeaders
    | Hook
)
