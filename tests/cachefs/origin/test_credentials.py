"""Credentials that expire in mid-load, redirects, and what they must not carry along."""

import socket
import threading
from collections.abc import Callable

import pytest
from tests.cachefs.origin.servers import Handler, Notes, RawServer, answer, header, partial

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Checksum, open_origin
from weightstream.errors import AccessDeniedError, CredentialsError, OriginError
from weightstream.settings import Settings

Start = Callable[[Handler], RawServer]
CONTENT = bytes(range(256)) * 100
BLOB = Blob("s3://bucket/dir/f", len(CONTENT), "abc")
EXPIRED = answer(
    "400 Bad Request", b"<Error><Code>ExpiredToken</Code><Message>Too old</Message></Error>"
)


def well(head: str, sock: socket.socket) -> bool:
    sock.sendall(partial(CONTENT, head))
    return True


def saying(reply: bytes) -> Handler:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(reply)
        return True

    return serve


def demanding(token: Callable[[], str]) -> Handler:
    """Serve only requests that carry the session token of this moment."""

    def serve(head: str, sock: socket.socket) -> bool:
        good = header(head, "X-Amz-Security-Token") == token()
        sock.sendall(partial(CONTENT, head) if good else EXPIRED)
        return True

    return serve


def give(monkeypatch: pytest.MonkeyPatch, server: RawServer, token: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)


def test_expired_credentials_are_renewed_in_mid_load(
    raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = "first"
    server = raw_server(demanding(lambda: valid))
    give(monkeypatch, server, "first")
    origin = open_origin("s3://bucket/dir", settings)
    into = bytearray(100)
    origin.read_into(BLOB, 0, memoryview(into), Notes())
    valid = "second"
    give(monkeypatch, server, "second")
    failed: list[BaseException] = []

    def work() -> None:
        own = bytearray(100)
        try:
            origin.read_into(BLOB, 0, memoryview(own), Notes())
            assert own == CONTENT[:100]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    origin.close()


def test_credentials_that_cannot_be_renewed(
    raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = raw_server(demanding(lambda: "never"))
    give(monkeypatch, server, "stale-token")
    origin = open_origin("s3://bucket/dir", settings)
    with pytest.raises(CredentialsError, match="ExpiredToken: Too old") as caught:
        origin.read_into(BLOB, 0, memoryview(bytearray(9)), Notes())
    assert len(server.heads) == 2
    assert "stale-token" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_anonymous_requests_are_not_signed(raw_server: Start, settings: Settings) -> None:
    server = raw_server(well)
    origin = open_origin("s3://bucket", settings, {"anon": True, "endpoint_url": server.url})
    origin.read_into(BLOB, 0, memoryview(bytearray(9)), Notes())
    assert server.heads[0].startswith("GET /bucket/dir/f HTTP/1.1")
    assert header(server.heads[0], "Authorization") == ""


def test_what_is_signed(
    raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = raw_server(well)
    give(monkeypatch, server, "t")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    options = {"requester_pays": True, "config_kwargs": {"s3": {"addressing_style": "path"}}}
    open_origin("s3://bucket", settings, options).read_into(
        BLOB, 3, memoryview(bytearray(9)), Notes()
    )
    (head,) = server.heads
    authorization = header(head, "Authorization")
    assert "/eu-west-1/s3/aws4_request" in authorization or "/us-east-1/" in authorization
    signed = authorization.partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert {"host", "range", "if-match", "x-amz-date", "x-amz-request-payer"} <= set(signed)
    assert "accept-encoding" not in signed
    assert header(head, "x-amz-request-payer") == "requester"


def test_full_object_checksum(
    raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        assert head.startswith("HEAD /bucket/dir/f ")
        assert header(head, "x-amz-checksum-mode") == "ENABLED"
        sock.sendall(
            b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "abc"\r\n'
            b"x-amz-checksum-crc64nvme: AAAAAAAAAP8=\r\nx-amz-checksum-type: FULL_OBJECT\r\n\r\n"
        )
        return True

    server = raw_server(serve)
    give(monkeypatch, server, "t")
    origin = open_origin("s3://bucket", settings)
    assert origin.checksum(BLOB) == Checksum("crc64nvme", 255)
    assert origin.checksum(Blob(BLOB.uri, BLOB.size, "other")) is None


def test_bucket_in_another_region_says_what_to_set(
    raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"<Error><Code>PermanentRedirect</Code><Message>Elsewhere</Message></Error>"
    reply = answer("301 Moved", body, x_amz_bucket_region="eu-west-1")
    server = raw_server(saying(reply))
    give(monkeypatch, server, "t")
    with pytest.raises(OriginError, match="set AWS_REGION=eu-west-1"):
        open_origin("s3://bucket", settings).read_into(BLOB, 0, memoryview(bytearray(9)), Notes())


def test_a_redirect_to_another_host_carries_no_authorization(
    raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = raw_server(well)
    url = f"http://localhost:{other.port}/there"
    reply = answer("307 Temporary Redirect", Location=url)
    server = raw_server(saying(reply))
    give(monkeypatch, server, "session-token")
    origin = open_origin("s3://bucket", settings)
    into = bytearray(9)
    origin.read_into(BLOB, 0, memoryview(into), Notes())
    assert into == CONTENT[:9]
    assert header(server.heads[0], "Authorization") != ""
    assert header(other.heads[0], "Authorization") == ""
    assert "session-token" not in other.heads[0]


def test_user_info_and_signed_queries_work_and_stay_secret(
    raw_server: Start, settings: Settings
) -> None:
    server = raw_server(saying(answer("403 Forbidden")))
    url = f"http://me:hunter2@127.0.0.1:{server.port}/f?sig=hunter2"
    origin = open_origin(url, settings)
    assert "hunter2" not in origin.uri
    with pytest.raises(AccessDeniedError) as caught:
        origin.read_into(Blob(origin.uri, 9, ""), 0, memoryview(bytearray(9)), Notes())
    assert "hunter2" not in str(caught.value)
    assert server.heads[0].startswith("GET /f?sig=hunter2 ")
    assert header(server.heads[0], "Authorization") == "Basic bWU6aHVudGVyMg=="
