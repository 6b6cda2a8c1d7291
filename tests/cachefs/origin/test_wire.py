"""Servers that misbehave: each ends in the right error, in bounded time, never in a wrong byte."""

import socket
import threading
import time
from collections.abc import Callable

import pytest
from tests.cachefs.origin.servers import (
    Handler,
    Notes,
    RawServer,
    answer,
    asked_range,
    header,
    partial,
)

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.errors import (
    AccessDeniedError,
    LoadCancelled,
    NotFoundError,
    ObjectChangedError,
    OriginError,
    ProtocolError,
    ThrottledError,
    UnavailableError,
)
from weightstream.settings import Settings

Start = Callable[[Handler], RawServer]
CONTENT = bytes(range(256)) * 16384  # 4 MiB


def opened(server: RawServer, settings: Settings) -> tuple[Origin, Blob]:
    return open_origin(server.url, settings), Blob(f"{server.url}/f", len(CONTENT), "abc")


def read(origin: Origin, blob: Blob, start: int = 0, stop: int = len(CONTENT)) -> bytes:
    into, notes = bytearray(stop - start), Notes()
    origin.read_into(blob, start, memoryview(into), notes)
    assert sum(notes.advanced) == len(into)
    assert notes.callback is None
    return bytes(into)


def well(head: str, sock: socket.socket) -> bool:
    sock.sendall(partial(CONTENT, head))
    return True


def saying(reply: bytes, keep: bool = True) -> Handler:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(reply)
        return keep

    return serve


def test_ranges_arrive_over_one_kept_connection(raw_server: Start, settings: Settings) -> None:
    server = raw_server(well)
    origin, blob = opened(server, settings)
    for start, stop in ((0, len(CONTENT)), (5, 6), (1, 3 << 20), (len(CONTENT) - 7, len(CONTENT))):
        assert read(origin, blob, start, stop) == CONTENT[start:stop]
    assert server.connections == 1
    head = server.heads[0]
    assert header(head, "If-Match") == '"abc"'
    assert header(head, "Accept-Encoding") == "identity"
    origin.close()


def test_progress_is_told_in_steps(raw_server: Start, settings: Settings) -> None:
    server = raw_server(well)
    origin, blob = opened(server, settings)
    notes = Notes()
    origin.read_into(blob, 0, memoryview(bytearray(len(CONTENT))), notes)
    assert len(notes.advanced) >= 3
    assert max(notes.advanced) <= 2 << 20


def test_a_short_body_is_named(raw_server: Start, settings: Settings) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head)[: -(1 << 20)])
        return False

    origin, blob = opened(raw_server(serve), settings)
    into, notes = bytearray(len(CONTENT)), Notes()
    with pytest.raises(ProtocolError, match=r"closed after \d+ of 4194304 bytes") as caught:
        origin.read_into(blob, 0, memoryview(into), notes)
    assert caught.value.transient
    done = sum(notes.advanced)
    assert done >= len(CONTENT) - (1 << 20) - 4096
    assert into[:done] == CONTENT[:done]


def test_a_reset_in_mid_body(raw_server: Start, settings: Settings) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head)[:100_000])
        time.sleep(0.1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False

    origin, blob = opened(raw_server(serve), settings)
    with pytest.raises((UnavailableError, ProtocolError)) as caught:
        read(origin, blob)
    assert caught.value.transient
    assert f"{blob.uri}: bytes 0-{len(CONTENT) - 1}: 127.0.0.1:" in str(caught.value)


@pytest.mark.parametrize("sent", [0, 10, 2_000_000])
def test_a_stalled_body_ends_in_time(raw_server: Start, settings: Settings, sent: int) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        data = partial(CONTENT, head)
        sock.sendall(data[: data.index(b"\r\n\r\n") + 4 + sent])
        return server.rest()

    server = raw_server(serve)
    origin, blob = opened(server, settings)
    started_s = time.monotonic()
    into, notes = bytearray(len(CONTENT)), Notes()
    with pytest.raises(UnavailableError, match="stall"):
        origin.read_into(blob, 0, memoryview(into), notes)
    assert time.monotonic() - started_s < 2.5 * settings.stall_timeout_s
    done = sum(notes.advanced)
    assert into[:done] == CONTENT[:done]


def test_no_answer_at_all_ends_in_time(raw_server: Start, settings: Settings) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        return server.rest()

    server = raw_server(serve)
    origin, blob = opened(server, settings)
    with pytest.raises(UnavailableError, match="stall"):
        read(origin, blob)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (answer("412 Precondition Failed"), ObjectChangedError),
        (answer("404 Not Found"), NotFoundError),
        (answer("403 Forbidden", b"<Code>AccessDenied</Code>"), AccessDeniedError),
        (answer("416 Range Not Satisfiable"), ObjectChangedError),
        (answer("500 Oops"), UnavailableError),
        (answer("200 OK", b"x"), ProtocolError),
        (answer("206 Partial Content", b"x", Content_Range="bytes 1-1/9"), ProtocolError),
        (b"HTTP/1.1 206 Partial Content\r\n\r\nwhatever", ProtocolError),
        (b"SSH-2.0-OpenSSH_9\r\n", ProtocolError),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", ProtocolError),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", ProtocolError),
    ],
)
def test_refusals_and_nonsense(
    raw_server: Start, settings: Settings, reply: bytes, error: type[OriginError]
) -> None:
    origin, blob = opened(raw_server(saying(reply, keep=False)), settings)
    with pytest.raises(error) as caught:
        read(origin, blob, 0, 100)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_a_broken_error_body_does_not_hide_the_status(
    raw_server: Start, settings: Settings
) -> None:
    reply = answer("403 Forbidden", b"<Code>Acc")[:-3]
    origin, blob = opened(raw_server(saying(reply, keep=False)), settings)
    with pytest.raises(AccessDeniedError, match="403"):
        read(origin, blob, 0, 100)


def test_a_chunked_error_body_is_understood(raw_server: Start, settings: Settings) -> None:
    body = b"1c\r\n<Code>AccessDenied</Code>abc\r\n0\r\n\r\n"
    reply = b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    origin, blob = opened(raw_server(saying(reply)), settings)
    with pytest.raises(AccessDeniedError, match="AccessDenied"):
        read(origin, blob, 0, 100)


def test_throttling(raw_server: Start, settings: Settings) -> None:
    reply = answer("503 Slow Down", Retry_After="3")
    origin, blob = opened(raw_server(saying(reply)), settings)
    with pytest.raises(ThrottledError) as caught:
        read(origin, blob, 0, 100)
    assert caught.value.retry_after_s == 3.0


def test_another_version_is_found_out_even_without_if_match(
    raw_server: Start, settings: Settings
) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head, ETag='"new"'))
        return True

    origin, blob = opened(raw_server(serve), settings)
    with pytest.raises(ObjectChangedError):
        read(origin, blob, 0, 100)


def test_a_connection_that_died_while_idle_is_replaced_silently(
    raw_server: Start, settings: Settings
) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        if asked_range(head)[0] == 1 and server.connections == 1:
            return False  # closes before the first byte of the second answer
        sock.sendall(partial(CONTENT, head))
        return True

    server = raw_server(serve)
    origin, blob = opened(server, settings)
    assert read(origin, blob, 0, 10) == CONTENT[:10]
    assert read(origin, blob, 1, 10) == CONTENT[1:10]
    assert server.connections == 2


def test_a_fresh_connection_that_dies_is_an_error(raw_server: Start, settings: Settings) -> None:
    server = raw_server(lambda head, sock: False)
    origin, blob = opened(server, settings)
    with pytest.raises(UnavailableError):
        read(origin, blob, 0, 10)
    assert server.connections == 1


def test_surplus_bytes_never_reach_the_next_answer(raw_server: Start, settings: Settings) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head) + b"surplus")
        return True

    server = raw_server(serve)
    origin, blob = opened(server, settings)
    for _ in range(3):
        assert read(origin, blob, 0, 10) == CONTENT[:10]
    assert server.connections == 3


def test_cancelling_wakes_a_stalled_read_at_once(raw_server: Start, settings: Settings) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head)[:1000])
        return server.rest()

    server = raw_server(serve)

    patient = settings.model_copy(update={"stall_timeout_s": 30.0})
    origin, blob = opened(server, patient)
    notes = Notes()

    def cancel() -> None:
        assert notes.registered.wait(5)
        time.sleep(0.3)
        callback = notes.callback
        assert callback is not None
        callback()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    started_s = time.monotonic()
    with pytest.raises(LoadCancelled):
        origin.read_into(blob, 0, memoryview(bytearray(len(CONTENT))), notes)
    assert time.monotonic() - started_s < 1.5
    canceller.join()


def test_cancelled_by_advance(raw_server: Start, settings: Settings) -> None:
    server = raw_server(well)
    origin, blob = opened(server, settings)

    def refuse(count: int) -> None:
        raise LoadCancelled("enough")

    with pytest.raises(LoadCancelled, match="enough"):
        origin.read_into(blob, 0, memoryview(bytearray(len(CONTENT))), Notes(on_advance=refuse))
    assert read(origin, blob, 0, 10) == CONTENT[:10]
    assert server.connections == 2


def test_refused_and_unresolvable(settings: Settings) -> None:
    blob = Blob("http://127.0.0.1:1/f", 10, "abc")
    with pytest.raises(UnavailableError, match=r"bytes 0-9: 127.0.0.1:1: connection refused"):
        open_origin("http://127.0.0.1:1", settings).read_into(
            blob, 0, memoryview(bytearray(10)), Notes()
        )
    blob = Blob("http://nowhere.invalid/f", 10, "abc")
    with pytest.raises(UnavailableError, match=r"nowhere.invalid: .*cannot be resolved"):
        open_origin("http://nowhere.invalid", settings).read_into(
            blob, 0, memoryview(bytearray(10)), Notes()
        )


def test_a_forked_child_uses_connections_of_its_own(raw_server: Start, settings: Settings) -> None:
    import multiprocessing

    server = raw_server(well)
    origin, blob = opened(server, settings)
    assert read(origin, blob, 0, 10) == CONTENT[:10]
    child = multiprocessing.get_context("fork").Process(target=read, args=(origin, blob, 5, 15))
    child.start()
    child.join(10)
    assert child.exitcode == 0
    assert read(origin, blob, 0, 10) == CONTENT[:10]
    assert server.connections == 2


def test_many_threads(raw_server: Start, settings: Settings) -> None:
    server = raw_server(well)
    origin, blob = opened(server, settings)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(20):
            start = (seed * 7919 + turn * 104729) % (len(CONTENT) - 70_000)
            if read(origin, blob, start, start + 70_000) != CONTENT[start : start + 70_000]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.connections <= 8


def test_a_slow_link_is_no_stall(raw_server: Start, settings: Settings) -> None:
    """Slower than the kernel's wake-up mark within the stall timeout, but never silent."""
    size = 2_000_000

    def serve(head: str, sock: socket.socket) -> bool:
        data = partial(CONTENT, head)
        for start in range(0, len(data), 200_000):
            sock.sendall(data[start : start + 200_000])
            time.sleep(0.25)
        return True

    server = raw_server(serve)
    origin, blob = opened(server, settings)
    assert read(origin, blob, 3, size) == CONTENT[3:size]


def test_a_server_that_closes_after_each_answer(raw_server: Start, settings: Settings) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head, Connection="close"))
        return False

    server = raw_server(serve)
    origin, blob = opened(server, settings)
    for start in range(3):
        assert read(origin, blob, start, 50_000) == CONTENT[start:50_000]
    assert server.connections == 3
