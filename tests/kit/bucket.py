"""A bucket that holds any keys: the answers to ListObjectsV2, for `RawServer`.

`rclone serve s3` keeps objects as files, so it cannot hold `a//b`, `..`, a NUL or a key that is a
file and a folder at once. Real buckets can.
"""

import hashlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote_from_bytes, unquote_to_bytes, urlsplit
from xml.sax.saxutils import escape

_SPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@dataclass
class Bucket:
    """Called by `RawServer` with each request's head."""

    objects: dict[bytes, bytes] = field(default_factory=dict)
    name: str = "models"
    page: int = 1000
    escape_names: bool = True
    """Whether names are sent URL-encoded, as asked for."""
    requests: list[dict[str, bytes]] = field(default_factory=list)
    before: Callable[[dict[str, bytes], socket.socket], bool] | None = None
    """Answers in the bucket's place where it returns true."""

    def __call__(self, head: str, sock: socket.socket) -> bool:
        url = urlsplit(head.split(" ", 2)[1])
        query = {
            name: unquote_to_bytes(values[0])
            for name, values in parse_qs(
                url.query.replace("%", "%25"), keep_blank_values=True
            ).items()
        }
        self.requests.append(query)
        if self.before is not None and self.before(query, sock):
            return True
        if url.path.strip("/") != self.name:
            sock.sendall(error("404 Not Found", "NoSuchBucket"))
        elif query.get("list-type") != b"2":
            sock.sendall(error("501 Not Implemented", "NotImplemented"))
        else:
            sock.sendall(reply("200 OK", self.listing(query)))
        return True

    def listing(self, query: dict[str, bytes]) -> bytes:
        """Return the document for one page."""
        prefix, delimiter = query.get("prefix", b""), query.get("delimiter", b"")
        rows = list(self._rows(prefix, delimiter))
        start = int(query.get("continuation-token", b"0").removeprefix(b"to/ken+"))
        stop = start + self.page
        more = "<IsTruncated>false</IsTruncated>"
        if stop < len(rows):
            token = f"<NextContinuationToken>to/ken+{stop}</NextContinuationToken>"
            more = f"<IsTruncated>true</IsTruncated>{token}"
        kind = "<EncodingType>url</EncodingType>" if self.escape_names else ""
        body = more + "".join(rows[start:stop]) + kind
        text = f"<?xml version='1.0'?><ListBucketResult {_SPACE}>{body}</ListBucketResult>"
        return text.encode()

    def _rows(self, prefix: bytes, delimiter: bytes) -> Iterator[str]:
        seen: set[bytes] = set()
        for key in sorted(self.objects):
            if not key.startswith(prefix):
                continue
            head, found, _ = (
                key[len(prefix) :].partition(delimiter) if delimiter else (b"", b"", b"")
            )
            common = prefix + head + found
            if found and common not in seen:
                seen.add(common)
                yield f"<CommonPrefixes><Prefix>{self._name(common)}</Prefix></CommonPrefixes>"
            elif not found:
                yield self._object(key)

    def _object(self, key: bytes) -> str:
        data = self.objects[key]
        etag = hashlib.md5(data).hexdigest()
        return (
            f"<Contents><Key>{self._name(key)}</Key><Size>{len(data)}</Size>"
            "<LastModified>2026-03-04T05:06:07.089Z</LastModified>"
            f"<ETag>&quot;{etag}&quot;</ETag><StorageClass>STANDARD</StorageClass></Contents>"
        )

    def _name(self, name: bytes) -> str:
        if self.escape_names:
            return quote_from_bytes(name, safe="/").replace("%20", "+")
        return escape(name.decode())


def reply(status: str, body: bytes) -> bytes:
    """Return a whole answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def error(status: str, code: str) -> bytes:
    """Return an error document."""
    return reply(status, f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode())
