"""The S3 listing of a static bucket, as XML files that a web server can hand out.

nginx is the benchmark's server because it never is the bottleneck; it knows ranges, ETag and
If-Match, but not ListObjectsV2. A benchmark's bucket never changes, so the few listings that its
clients ask for are written out beforehand, with the ETags that nginx itself will send.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.sax.saxutils import escape

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of the bucket."""

    key: str
    size_bytes: int
    modified_s: int

    @property
    def etag(self) -> str:
        """Return nginx's ETag without quotes: time of change and size, both in hex."""
        return f"{self.modified_s:x}-{self.size_bytes:x}"


@dataclass(frozen=True, slots=True)
class Listing:
    """One answer: for which query, and with which body."""

    prefix: str
    delimiter: str
    body: str


def scan(bucket: Path) -> tuple[Entry, ...]:
    """Return the objects of a bucket's folder, in the order of their keys (UTF-8 bytes)."""
    entries = []
    for path in bucket.rglob("*"):
        if path.is_file():
            status = path.stat()
            key = path.relative_to(bucket).as_posix()
            entries.append(Entry(key, status.st_size, int(status.st_mtime)))
    return tuple(sorted(entries, key=lambda entry: entry.key.encode()))


def listings(bucket: str, entries: tuple[Entry, ...], *, keys: bool = True) -> tuple[Listing, ...]:
    """Return an answer for every prefix that a client may ask for: root, folders and keys.

    `entries` are sorted as `scan` sorts them. `keys=False` leaves the keys themselves out: a bucket
    of thousands of objects would have thousands of answers that only few clients ask for.
    """
    prefixes = {""}
    for entry in entries:
        parts = entry.key.split("/")
        for i in range(len(parts) if keys else len(parts) - 1):
            folder = "/".join(parts[: i + 1])
            prefixes |= {folder, folder + "/"}
    order = [entry.key.encode() for entry in entries]
    found = []
    for prefix in sorted(prefixes):
        first = bisect_left(order, prefix.encode())
        last = bisect_left(order, prefix.encode() + b"\xff")  # a byte that is in no UTF-8 text
        part = entries[first:last]
        found += [
            Listing(prefix, delimiter, listing_xml(bucket, part, prefix, delimiter))
            for delimiter in ("", "/")
        ]
    return tuple(found)


def listing_xml(bucket: str, entries: tuple[Entry, ...], prefix: str, delimiter: str) -> str:
    """Return the ListObjectsV2 result for one prefix, never truncated."""
    found: list[Entry] = []
    folders: set[str] = set()
    for entry in entries:
        if not entry.key.startswith(prefix):
            continue
        rest = entry.key[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.split(delimiter, 1)[0] + delimiter)
        else:
            found.append(entry)
    contents = "".join(_contents(entry) for entry in found)
    common = "".join(
        f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
        for folder in sorted(folders)
    )
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="{_NAMESPACE}">'
        f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"{'<Delimiter>/</Delimiter>' if delimiter else ''}<MaxKeys>1000</MaxKeys>"
        f"<KeyCount>{len(found) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{contents}{common}</ListBucketResult>\n"
    )


def _contents(entry: Entry) -> str:
    modified = datetime.fromtimestamp(entry.modified_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return (
        f"<Contents><Key>{escape(entry.key)}</Key><LastModified>{modified}</LastModified>"
        f"<ETag>&quot;{entry.etag}&quot;</ETag><Size>{entry.size_bytes}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def query_pattern(text: str) -> str:
    """Return a regular expression for a query's value, percent-encoded or not."""
    return "".join(
        re.escape(char) if char.isalnum() else f"(?:{re.escape(char)}|%{ord(char):02X})"
        for char in text
    )
