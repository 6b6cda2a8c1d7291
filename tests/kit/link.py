"""One client connection of the fault proxy: relay each request, and do to it what the rules say."""

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from tests.kit import faults as f
from tests.kit.s3 import ACCESS_KEY, SECRET_KEY
from tests.kit.wire import Connection, Request, Response, WireClosed, get

BUFFER_BYTES = 1 << 20
IDLE_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Exchange:
    """One request and what became of it; `body_bytes` grows while the body is sent."""

    method: str
    path: str
    range: tuple[int, int] | None
    started_s: float
    in_flight: int
    """Requests under way when this one came, itself included."""
    status: int = 0
    body_bytes: int = 0
    ended_s: float = 0.0


class Hangup(Exception):
    """The client's connection ends here, on purpose."""

    def __init__(self, reset: bool) -> None:
        self.reset = reset


@dataclass(frozen=True, slots=True)
class Terms:
    """What a link needs of its proxy."""

    upstream: tuple[str, int]
    faithful: bool
    checksums: dict[str, tuple[str, str]]
    record: Callable[[Request], AbstractContextManager[tuple[Exchange, list[f.Fault]]]]
    stopped_within: Callable[[float], bool]


class Link:
    """One client connection and its connection to the server."""

    def __init__(self, terms: Terms, sock: socket.socket) -> None:
        sock.settimeout(IDLE_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.terms = terms
        self.client = Connection(sock)
        self.upstream: Connection | None = None
        self.buffer = memoryview(bytearray(BUFFER_BYTES))

    def _pause(self, seconds: float) -> None:
        if self.terms.stopped_within(seconds):
            raise Hangup(reset=True)

    def close_upstream(self) -> None:
        """Drop the connection to the server: its answer is not wanted any more."""
        if self.upstream is not None:
            self.upstream.sock.close()
            self.upstream = None

    def exchange(self) -> bool:
        """Serve one request; False when the client has hung up."""
        request = self.client.read_request()
        if request is None:
            return False
        if get(request.headers, "expect"):
            self.client.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.client.read_exactly(int(get(request.headers, "content-length") or 0))
        with self.terms.record(request) as (exchange, hit):
            self._answer(request, body, exchange, hit)
        return get(request.headers, "connection") != "close"

    def _answer(
        self, request: Request, body: bytes, exchange: Exchange, hit: list[f.Fault]
    ) -> None:
        self._before(request, hit)
        final = next((x for x in hit if isinstance(x, f.Status | f.Redirect | f.Drop)), None)
        if isinstance(final, f.Drop):
            raise Hangup(final.reset)
        if isinstance(final, f.Status):
            self._say(request, exchange, final)
        elif isinstance(final, f.Redirect):
            head = Response(307, "", (("Location", final.location), ("Content-Length", "0")))
            exchange.status = 307
            self.client.sock.sendall(head.encode())
        elif self.terms.faithful and _unsigned(request):
            self._say(request, exchange, f.FORBIDDEN)
        else:
            self._relay(request, body, exchange, hit)

    def _before(self, request: Request, hit: list[f.Fault]) -> None:
        for fault in hit:
            match fault:
                case f.Latency(seconds) | f.Stall(seconds, None):
                    self._pause(seconds)
                case f.Hook(call):
                    call(request)

    def _say(self, request: Request, exchange: Exchange, status: f.Status) -> None:
        exchange.status = status.status
        document = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{status.code}</Code><Message>{status.message}</Message></Error>"
        ).encode()
        head = Response(
            status.status,
            status.code,
            (("Content-Type", "application/xml"), ("Content-Length", str(len(document)))),
        )
        if status.retry_after_s is not None:
            head = head.with_headers(("Retry-After", str(status.retry_after_s)))
        self.client.sock.sendall(head.encode() + (b"" if request.method == "HEAD" else document))

    def _relay(self, request: Request, body: bytes, exchange: Exchange, hit: list[f.Fault]) -> None:
        ignore_range = any(isinstance(x, f.IgnoreRange) for x in hit)
        head = self._ask(_onward(request, ignore_range), body)
        if self.terms.faithful:
            wanted, etag = get(request.headers, "if-match"), get(head.headers, "etag")
            if wanted and head.status < 300 and wanted not in ("*", etag):
                self.close_upstream()
                return self._say(request, exchange, f.CHANGED)
            head = _faithful(head, request, self.terms.checksums)
        if (get(head.headers, "transfer-encoding") or "").lower() == "chunked":
            return self._send_chunked(head, exchange)
        empty = request.method == "HEAD" or head.status in (204, 304)
        length = 0 if empty else int(get(head.headers, "content-length") or 0)
        exchange.status = head.status
        self._send_head(_altered(head, hit), hit)
        offset = 0 if ignore_range or request.range is None else request.range[0]
        self._send_body(length, offset, exchange, hit)
        if any(isinstance(x, f.Length) for x in hit):
            raise Hangup(reset=False)
        if (get(head.headers, "connection") or "").lower() == "close":
            self.close_upstream()

    def _send_head(self, head: Response, hit: list[f.Fault]) -> None:
        rates = [x.rate_bytes_s for x in hit if isinstance(x, f.DripHead)]
        if not rates:
            self.client.sock.sendall(head.encode())
            return
        for byte in head.encode():
            self.client.sock.sendall(bytes([byte]))
            self._pause(1 / rates[0])

    def _ask(self, request: Request, body: bytes) -> Response:
        for attempt in (1, 2):  # the server may have closed an idle connection meanwhile
            if self.upstream is None:
                sock = socket.create_connection(self.terms.upstream, timeout=IDLE_TIMEOUT_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.upstream = Connection(sock)
            try:
                self.upstream.sock.sendall(request.encode() + body)
                return self.upstream.read_response()
            except (OSError, WireClosed):
                self.close_upstream()
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _send_chunked(self, head: Response, exchange: Exchange) -> None:
        assert self.upstream is not None
        document = self.upstream.read_chunked()
        head = head.with_headers(
            ("Transfer-Encoding", None), ("Content-Length", str(len(document)))
        )
        exchange.status = head.status
        self.client.sock.sendall(head.encode() + document)
        exchange.body_bytes += len(document)

    def _send_body(self, length: int, offset: int, exchange: Exchange, hit: list[f.Fault]) -> None:
        assert self.upstream is not None
        plan = _BodyPlan(length, hit)
        sent = 0
        while sent < length:
            limit = plan.next_stop(sent) - sent
            if limit == 0:
                self._interrupt(plan)
                continue
            step = min(limit, plan.step_bytes)
            count = self.upstream.recv_into(self.buffer[:step])
            plan.corrupt(self.buffer[:count], offset + sent)
            self.client.sock.sendall(self.buffer[:count])
            sent += count
            exchange.body_bytes += count
            if plan.rate_bytes_s:
                self._pause(count / plan.rate_bytes_s)
        if plan.next_stop(sent) == sent:
            self._interrupt(plan)

    def _interrupt(self, plan: "_BodyPlan") -> None:
        fault = plan.take()
        if isinstance(fault, f.Stall):
            self._pause(fault.seconds)
        else:
            self.close_upstream()
            raise Hangup(reset=isinstance(fault, f.Reset))


class _BodyPlan:
    """The faults that strike while a body is sent, in the order of their offsets."""

    def __init__(self, length: int, hit: list[f.Fault]) -> None:
        self.length = length
        rates = [x.rate_bytes_s for x in hit if isinstance(x, f.Drip)]
        self.rate_bytes_s = min(rates, default=0.0)
        # A drip in twenty steps a second is smooth enough and cheap.
        self.step_bytes = max(1, int(self.rate_bytes_s / 20)) if rates else BUFFER_BYTES
        self._corruptions = [x for x in hit if isinstance(x, f.Corrupt)]
        stops: list[tuple[int, f.Reset | f.ShortBody | f.Stall]] = []
        for fault in hit:
            if isinstance(fault, f.Reset | f.ShortBody | f.Stall) and fault.after_bytes is not None:
                stops.append((min(fault.after_bytes, length), fault))
        self._stops = sorted(stops, key=lambda stop: stop[0])

    def next_stop(self, sent: int) -> int:
        """Return where the next interruption waits, or past the end."""
        return self._stops[0][0] if self._stops else self.length + 1

    def take(self) -> f.Reset | f.ShortBody | f.Stall:
        """Return the interruption that is due and forget it."""
        return self._stops.pop(0)[1]

    def corrupt(self, data: memoryview, offset: int) -> None:
        """Flip the bytes that are to be wrong; `offset` is where `data` lies in the object."""
        for fault in self._corruptions:
            for at in range(max(fault.at, offset), min(fault.at + fault.count, offset + len(data))):
                data[at - offset] ^= 0xFF


def _unsigned(request: Request) -> bool:
    return get(request.headers, "authorization") is None and "X-Amz-Signature" not in request.target


def _onward(request: Request, whole: bool) -> Request:
    dropped = {"expect", "range", "if-match"} if whole else {"expect"}
    kept = tuple(h for h in request.headers if h[0].lower() not in dropped)
    return _signed_anew(replace(request, headers=kept)) if whole else replace(request, headers=kept)


def _signed_anew(request: Request) -> Request:
    """Sign a changed request: the client's signature covers its Range header."""
    host = get(request.headers, "host") or ""
    signed = AWSRequest(request.method, f"http://{host}{request.target}", {"Host": host})
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(signed)
    return replace(request, headers=tuple(signed.headers.items()))


def _faithful(head: Response, request: Request, checksums: dict[str, tuple[str, str]]) -> Response:
    if head.status == 200 and get(head.headers, "content-range"):
        head = replace(head, status=206, reason="Partial Content")
    asked = (get(request.headers, "x-amz-checksum-mode") or "").upper() == "ENABLED"
    if asked and head.status == 200 and request.path in checksums:
        head = head.with_headers(checksums[request.path], ("x-amz-checksum-type", "FULL_OBJECT"))
    return head


def _altered(head: Response, hit: list[f.Fault]) -> Response:
    for fault in hit:
        if isinstance(fault, f.AddHeaders):
            head = head.with_headers(*fault.headers)
        elif isinstance(fault, f.Length):
            length = int(get(head.headers, "content-length") or 0) + fault.delta
            head = head.with_headers(("Content-Length", str(max(0, length))))
        elif isinstance(fault, f.ContentRange):
            head = head.with_headers(("Content-Range", _other_range(head, fault)))
    return head


def _other_range(head: Response, fault: f.ContentRange) -> str:
    if fault.value is not None:
        return fault.value
    span, _, total = (get(head.headers, "content-range") or "bytes 0-0/0")[6:].partition("/")
    start, _, last = span.partition("-")
    return f"bytes {int(start) + fault.shift}-{int(last) + fault.shift}/{total}"
