"""What an HTTP answer means: pure functions from status and headers to a verdict.

Nothing here does I/O, so every rule has a unit test and the parsers run under Hypothesis.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage

from weightstream.cachefs.blob import Extent
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
from weightstream.log import mask_secrets

_CONTENT_RANGE = re.compile(
    r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z", re.ASCII | re.IGNORECASE
)
_CODE = re.compile(rb"<Code>\s*([\w.]{1,80})\s*</Code>")
_MESSAGE = re.compile(rb"<Message>\s*([^<]{1,300}?)\s*</Message>", re.DOTALL)

# Credentials that were good once: worth one refresh. The first three are S3's own words.
EXPIRED_CODES = frozenset({"ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Asked:
    """One request in words, for messages and checks."""

    uri: str
    host: str
    extent: Extent | None = None
    size: int | None = None
    version: str = ""

    def says(self, cause: object) -> str:
        """Return the one line that names file, range, host and cause, and holds no secret.

        The cause may be a server's own words, and servers quote what they were sent.
        """
        where = f": {self.extent}" if self.extent is not None else ""
        text = " ".join(str(cause).split()) or type(cause).__name__
        return mask_secrets(f"{self.uri}{where}: {self.host}: {text}")


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and, where it is small and wanted, the body."""

    url: Url
    status: int
    reason: str
    headers: HTTPMessage
    body: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        """Tell whether the request succeeded."""
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class ContentRange:
    """A parsed Content-Range header; `total` is None where the server does not know it."""

    extent: Extent
    total: int | None


def parse_content_range(text: str) -> ContentRange | None:
    """Parse `bytes 0-9/100`; None for anything else."""
    match = _CONTENT_RANGE.match(text.strip())
    if match is None:
        return None
    start, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < start or (total is not None and last >= total):
        return None
    return ContentRange(Extent(start, last + 1), total)


def parse_retry_after(text: str | None, now_s: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its two forms."""
    if not text:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, when.timestamp() - now_s)


def check_range(answer: Answer, asked: Asked, extent: Extent) -> None:
    """Raise unless the body that follows is exactly the range that was asked for."""
    _check_version(answer, asked)
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ProtocolError(asked.says(f"the body is encoded as {encoding}, not as it is stored"))
    # rclone's S3 server (1.75) says 200 where it should say 206, with a right Content-Range.
    if answer.status == 206 or (answer.status == 200 and "Content-Range" in answer.headers):
        _check_partial(answer, asked, extent)
    elif answer.status != 200 or extent != Extent(0, asked.size or 0):
        raise ProtocolError(asked.says(f"answered {answer.status} to a range request, not 206"))
    length = content_length(answer.headers)
    if length != len(extent):
        told = "no Content-Length" if length is None else f"Content-Length {length}"
        raise ProtocolError(asked.says(f"{told} where {len(extent)} bytes were asked for"))


def _check_version(answer: Answer, asked: Asked) -> None:
    """Find another version out by its ETag or size: some servers ignore If-Match."""
    etag = strong_etag(plain_etag(answer.headers.get("ETag")))
    wanted = strong_etag(asked.version)
    if etag and wanted and etag != wanted:
        raise ObjectChangedError(asked.says("the file was replaced by another version"))


def _check_partial(answer: Answer, asked: Asked, extent: Extent) -> None:
    text = answer.headers.get("Content-Range", "")
    parsed = parse_content_range(text)
    if parsed is None or parsed.extent != extent:
        raise ProtocolError(asked.says(f"wrong Content-Range {text[:80]!r}"))
    if parsed.total is not None and asked.size is not None and parsed.total != asked.size:
        raise ObjectChangedError(
            asked.says(f"the file has {parsed.total} bytes now, not {asked.size}")
        )


def content_length(headers: HTTPMessage) -> int | None:
    """Return the length that the headers promise, None where they promise none."""
    text = headers.get("Content-Length", "").strip()
    if "Transfer-Encoding" in headers or not (text.isascii() and text.isdigit()):
        return None
    return int(text[:19])


def error_code(answer: Answer) -> str:
    """Return the `<Code>` of an S3-like error body; empty where there is none."""
    match = _CODE.search(answer.body)
    return match[1].decode("ascii") if match else ""


def refusal(answer: Answer, asked: Asked, now_s: float) -> OriginError:
    """Return the error that an answer of status 300 and above stands for."""
    text = asked.says(f"{answer.status} {answer.reason}".strip() + _detail(answer))
    code = error_code(answer)
    if code in EXPIRED_CODES:
        return CredentialsError(text)
    match answer.status:
        case 401 | 403 | 407:
            return AccessDeniedError(text)
        case 404 | 410:
            return NotFoundError(text)
        case 412 | 416:
            return ObjectChangedError(text)
        case 429 | 503:
            return ThrottledError(text, parse_retry_after(answer.headers.get("Retry-After"), now_s))
        case 408:
            return UnavailableError(text)
    if answer.status >= 500 or code == "RequestTimeout":
        return UnavailableError(text)
    return OriginError(text)


def _detail(answer: Answer) -> str:
    code = error_code(answer)
    message = _MESSAGE.search(answer.body)
    words = message[1].decode("utf-8", "replace") if message else ""
    region = answer.headers.get("x-amz-bucket-region", "")
    if answer.status in REDIRECTS and region:
        words = f"the bucket is in region {region}: set AWS_REGION={region}"
    detail = ": ".join(part for part in (code, words) if part)
    return f" ({detail})" if detail else ""


def strong_etag(version: str) -> str | None:
    """Return the If-Match value for a blob's version; None where it is no strong ETag."""
    if not version or version.startswith("W/") or version.endswith(" GMT"):
        return None
    if '"' in version or not version.isascii() or not version.isprintable():
        return None
    return f'"{version}"'


def plain_etag(text: str | None) -> str:
    """Return an ETag as `Blob.version` keeps it: without quotes, weak ones with their mark."""
    text = (text or "").strip()
    weak = text.startswith("W/")
    bare = text.removeprefix("W/").strip('"')
    return f"W/{bare}" if weak and bare else bare
