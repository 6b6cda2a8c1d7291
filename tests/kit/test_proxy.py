"""The kit itself: what rclone answers, what the proxy makes of it, and every fault."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import botocore.session
import pytest
from botocore.client import Config
from botocore.exceptions import ClientError
from tests.kit import faults as f
from tests.kit.models import random_bytes
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import ACCESS_KEY, SECRET_KEY, S3Server

BODY = random_bytes(3 << 20, "proxy")
GET = f.When(method="GET", key="file.bin")


def s3_client(endpoint: str, secret: str = SECRET_KEY) -> Any:
    config = Config(retries={"max_attempts": 0}, read_timeout=5, connect_timeout=2)
    return botocore.session.Session().create_client(
        "s3", "us-east-1", endpoint_url=endpoint, config=config,
        aws_access_key_id=ACCESS_KEY, aws_secret_access_key=secret,
    )  # fmt: skip


@pytest.fixture
def client(s3: S3Server, proxy: FaultProxy) -> Iterator[Any]:
    s3.put("models/proxy/file.bin", BODY)
    client = s3_client(proxy.url)
    yield client
    client.close()


def get(client: Any, start: int = 0, stop: int = len(BODY), **more: str) -> tuple[Any, bytes]:
    span = f"bytes={start}-{stop - 1}"
    answer = client.get_object(Bucket="models", Key="proxy/file.bin", Range=span, **more)
    return answer, answer["Body"].read()


def test_a_signed_range_passes_and_is_counted(client: Any, proxy: FaultProxy) -> None:
    answer, body = get(client, 1000, 2_000_000)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert body == BODY[1000:2_000_000]
    (exchange,) = proxy.exchanges(GET)
    assert exchange.range == (1000, 2_000_000)
    assert proxy.body_bytes("file.bin") == 1_999_000


def test_rclone_itself_answers_a_range_with_200(client: Any, s3: S3Server) -> None:
    """If this fails, rclone has learned it, and the proxy need not help any more."""
    direct = s3_client(s3.url)
    answer, body = get(direct, 10, 20)
    direct.close()
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert (answer["ContentRange"], body) == (f"bytes 10-19/{len(BODY)}", BODY[10:20])


def test_if_match_is_enforced_from_the_servers_etag(client: Any, s3: S3Server) -> None:
    etag = client.head_object(Bucket="models", Key="proxy/file.bin")["ETag"]
    assert get(client, 0, 10, IfMatch=etag)[1] == BODY[:10]
    s3.put("models/proxy/file.bin", BODY[::-1])
    with pytest.raises(ClientError, match="PreconditionFailed"):
        get(client, 0, 10, IfMatch=etag)
    assert get(client, 0, 10)[1] == BODY[::-1][:10]


def test_wrong_secret_and_no_signature_are_refused(client: Any, proxy: FaultProxy) -> None:
    wrong = s3_client(proxy.url, "wrong-secret")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        get(wrong)
    wrong.close()
    with socket.create_connection((proxy.host, proxy.port)) as sock:
        sock.sendall(b"GET /models/proxy/file.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("fault", "code"),
    [(f.SLOW_DOWN, "SlowDown"), (f.EXPIRED_TOKEN, "ExpiredToken"), (f.NOT_FOUND, "NoSuchKey")],
)
def test_status_once(client: Any, proxy: FaultProxy, fault: f.Status, code: str) -> None:
    proxy.add(GET, fault)
    with pytest.raises(ClientError, match=code):
        get(client)
    assert get(client)[1] == BODY


@pytest.mark.parametrize("fault", [f.Reset(100_000), f.ShortBody(100_000), f.Length(10), f.Drop()])
def test_broken_bodies_are_broken_once(client: Any, proxy: FaultProxy, fault: f.Fault) -> None:
    proxy.add(GET, fault)
    with pytest.raises(Exception, match=r"(?i)closed|reset|incomplete|broken|read"):
        get(client)
    assert get(client)[1] == BODY


def test_corrupt_flips_bytes_of_the_object(client: Any, proxy: FaultProxy) -> None:
    proxy.add(GET, f.Corrupt(at=2_000_000, count=2))
    _, body = get(client, 1_000_000, 3_000_000)
    wrong = [i for i, (a, b) in enumerate(zip(body, BODY[1_000_000:], strict=False)) if a != b]
    assert wrong == [1_000_000, 1_000_001]


def test_stall_drip_and_latency_take_time(client: Any, proxy: FaultProxy) -> None:
    proxy.add(GET, f.Latency(0.1), f.Stall(0.1), f.Stall(0.1, after_bytes=5), f.Drip(10 << 20))
    started = time.monotonic()
    assert get(client)[1] == BODY
    assert 0.5 < time.monotonic() - started < 3


def test_ignored_range_and_lying_headers(client: Any, proxy: FaultProxy) -> None:
    proxy.add(GET, f.IgnoreRange())
    answer, body = get(client, 100, 200)
    assert (answer["ResponseMetadata"]["HTTPStatusCode"], body) == (200, BODY)
    proxy.add(GET, f.ContentRange(shift=1))
    assert get(client, 100, 200)[0]["ContentRange"] == f"bytes 101-200/{len(BODY)}"


def test_nth_times_and_hooks(client: Any, proxy: FaultProxy) -> None:
    seen: list[str] = []
    proxy.add(f.When(key="file.bin", nth=2, times=2), f.Hook(lambda r: seen.append(r.path)))
    for _ in range(4):
        get(client, 0, 10)
    assert seen == ["/models/proxy/file.bin"] * 2


def test_checksums_are_stated_on_request(client: Any, proxy: FaultProxy) -> None:
    proxy.checksums["/models/proxy/file.bin"] = ("x-amz-checksum-crc64nvme", "AAAAAAAAAAA=")
    head = client.head_object(Bucket="models", Key="proxy/file.bin", ChecksumMode="ENABLED")
    assert head["ChecksumCRC64NVME"] == "AAAAAAAAAAA="
    assert head["ChecksumType"] == "FULL_OBJECT"
    assert "ChecksumCRC64NVME" not in client.head_object(Bucket="models", Key="proxy/file.bin")


def test_listing_and_put_pass_through(client: Any, s3: S3Server) -> None:
    client.put_object(Bucket="models", Key="proxy/new.bin", Body=BODY)
    found = client.list_objects_v2(Bucket="models", Prefix="proxy/")["Contents"]
    assert {e["Key"]: e["Size"] for e in found}["proxy/new.bin"] == len(BODY)
