"""What an HTTP answer means."""

from email.utils import formatdate
from http.client import HTTPMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.origin.base import Checksum
from weightstream.cachefs.origin.responses import (
    Answer,
    Asked,
    check_range,
    parse_content_range,
    parse_retry_after,
    plain_etag,
    refusal,
    strong_etag,
)
from weightstream.cachefs.origin.s3 import parse_checksum
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    OriginError,
    ProtocolError,
    ThrottledError,
    UnavailableError,
)

HERE = Url.parse("http://h/x")
EXTENT = Extent(10, 20)
ASKED = Asked("s3://b/x", "h:9000", EXTENT, 100, "abc")


def made(status: int, body: bytes = b"", **headers: str) -> Answer:
    message = HTTPMessage()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return Answer(HERE, status, "Reason", message, body)


@given(st.integers(0, 10**18), st.integers(1, 10**9), st.integers(0, 10**9))
def test_content_range_round_trips(start: int, length: int, rest: int) -> None:
    total = start + length + rest
    parsed = parse_content_range(f"bytes {start}-{start + length - 1}/{total}")
    assert parsed is not None
    assert (parsed.extent, parsed.total) == (Extent(start, start + length), total)


@given(st.text(max_size=60))
def test_content_range_never_raises_and_never_lies(text: str) -> None:
    parsed = parse_content_range(text)
    assert parsed is None or 0 <= parsed.extent.start < parsed.extent.stop


@pytest.mark.parametrize(
    "text", ["", "bytes 5-4/10", "bytes 0-10/10", "bytes */10", "0-1/2", "bytes \u0660-1/2"]
)
def test_content_range_refuses(text: str) -> None:
    assert parse_content_range(text) is None


def test_content_range_without_total() -> None:
    parsed = parse_content_range("bytes 0-9/*")
    assert parsed is not None
    assert parsed.total is None


@given(st.integers(0, 10**8), st.integers(0, 10**6))
def test_retry_after_in_both_forms(now_s: int, wait_s: int) -> None:
    assert parse_retry_after(str(wait_s), now_s) == wait_s
    assert parse_retry_after(formatdate(now_s + wait_s, usegmt=True), now_s) == wait_s


@given(st.one_of(st.none(), st.text(max_size=40)), st.floats(0, 1e10))
def test_retry_after_never_raises_and_is_never_negative(text: str | None, now_s: float) -> None:
    wait_s = parse_retry_after(text, now_s)
    assert wait_s is None or wait_s >= 0


def test_good_range_passes() -> None:
    good = made(206, Content_Range="bytes 10-19/100", Content_Length="10", ETag='"abc"')
    check_range(good, ASKED, EXTENT)


def test_whole_file_may_come_as_200() -> None:
    whole = Asked("s3://b/x", "h", Extent(0, 100), 100)
    check_range(made(200, Content_Length="100"), whole, Extent(0, 100))
    with pytest.raises(ProtocolError, match="answered 200"):
        check_range(made(200, Content_Length="100"), ASKED, EXTENT)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"Content_Range": "bytes 10-19/100"}, ProtocolError),
        ({"Content_Range": "bytes 10-19/100", "Content_Length": "9"}, ProtocolError),
        ({"Content_Range": "bytes 11-20/100", "Content_Length": "10"}, ProtocolError),
        ({"Content_Length": "10"}, ProtocolError),
        ({"Content_Range": "bytes 10-19/101", "Content_Length": "10"}, ObjectChangedError),
        (
            {"Content_Range": "bytes 10-19/100", "Content_Length": "10", "ETag": '"z"'},
            ObjectChangedError,
        ),
        (
            {
                "Content_Range": "bytes 10-19/100",
                "Content_Length": "10",
                "Content_Encoding": "gzip",
            },
            ProtocolError,
        ),
        (
            {
                "Content_Range": "bytes 10-19/100",
                "Content_Length": "10",
                "Transfer_Encoding": "chunked",
            },
            ProtocolError,
        ),
    ],
)
def test_bad_ranges_are_refused(headers: dict[str, str], error: type[OriginError]) -> None:
    with pytest.raises(error) as caught:
        check_range(made(206, b"", **headers), ASKED, EXTENT)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("status", "error", "transient"),
    [
        (400, OriginError, False),
        (401, AccessDeniedError, False),
        (403, AccessDeniedError, False),
        (404, NotFoundError, False),
        (408, UnavailableError, True),
        (412, ObjectChangedError, False),
        (416, ObjectChangedError, False),
        (429, ThrottledError, True),
        (500, UnavailableError, True),
        (502, UnavailableError, True),
        (503, ThrottledError, True),
        (504, UnavailableError, True),
    ],
)
def test_statuses(status: int, error: type[OriginError], transient: bool) -> None:
    refused = refusal(made(status), ASKED, 0.0)
    assert type(refused) is error
    assert refused.transient is transient
    assert str(refused) == f"s3://b/x: bytes 10-19: h:9000: {status} Reason"


def test_xml_code_and_message_are_part_of_the_line() -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>No\nway</Message></Error>"
    assert str(refusal(made(403, body), ASKED, 0.0)).endswith("(AccessDenied: No way)")


@pytest.mark.parametrize("code", ["ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed"])
def test_expired_credentials_are_told_apart(code: str) -> None:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    assert type(refusal(made(400, body), ASKED, 0.0)) is CredentialsError


def test_throttling_carries_the_wish_of_the_server() -> None:
    refused = refusal(made(503, b"", Retry_After="7"), ASKED, 0.0)
    assert isinstance(refused, ThrottledError)
    assert refused.retry_after_s == 7.0


def test_region_redirect_says_what_to_set() -> None:
    refused = refusal(made(301, x_amz_bucket_region="eu-west-1"), ASKED, 0.0)
    assert "AWS_REGION=eu-west-1" in str(refused)


@pytest.mark.parametrize(
    ("text", "version", "match"),
    [
        ('"abc"', "abc", '"abc"'),
        ("abc", "abc", '"abc"'),
        ('W/"abc"', "W/abc", None),
        (None, "", None),
        ("", "", None),
    ],
)
def test_etags(text: str | None, version: str, match: str | None) -> None:
    assert plain_etag(text) == version
    assert strong_etag(version) == match


@given(st.text(max_size=40))
def test_an_etag_can_never_inject_a_header(version: str) -> None:
    match = strong_etag(version)
    assert match is None or ("\r" not in match and "\n" not in match)


def test_checksums() -> None:
    full = made(200, x_amz_checksum_crc64nvme="AAAAAAAAAAE=", x_amz_checksum_type="FULL_OBJECT")
    assert parse_checksum(full.headers) == Checksum("crc64nvme", 1)
    assert parse_checksum(made(200, x_amz_checksum_crc32c="AAAAAg==").headers) == Checksum(
        "crc32c", 2
    )
    parts = made(200, x_amz_checksum_crc32c="AAAAAg==", x_amz_checksum_type="COMPOSITE")
    assert parse_checksum(parts.headers) is None
    assert parse_checksum(made(200, x_amz_checksum_crc32c="AAAAAg==-3").headers) is None
    assert parse_checksum(made(200, x_amz_checksum_crc32c="!!").headers) is None
    assert parse_checksum(made(200).headers) is None
