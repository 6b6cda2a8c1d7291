"""Manifests that somebody may put into a bucket to cost others their memory, files or trust."""

import base64
import json
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
Document = dict[str, Any]
Change = Callable[[Document], object]


def _file(**changes: Any) -> Change:
    """Return what changes the second file of a document."""
    return lambda document: document["files"][1].update(changes)


def _top(**changes: Any) -> Change:
    return lambda document: document.update(changes)


def _digests(count: int) -> str:
    return base64.b64encode(bytes(32 * count)).decode()


CHANGES: dict[str, tuple[Change, str]] = {
    # what: (how a good document is changed, what the refusal says)
    "climbs out": (_file(path="a/../../etc/passwd"), "leads out"),
    "climbs out at once": (_file(path=".."), "leads out"),
    "absolute": (_file(path="/etc/passwd"), "is absolute"),
    "empty path": (_file(path=""), "empty component"),
    "empty component": (_file(path="b//c"), "empty component"),
    "ends with a slash": (_file(path="b/"), "empty component"),
    "dot": (_file(path="./b"), "empty component"),
    "NUL": (_file(path="b\0.bin"), "control character"),
    "newline": (_file(path="b\nERROR all is lost"), "control character"),
    "escape sequence": (_file(path="b\x1b[2J"), "control character"),
    "lone surrogate": (_file(path="b\udc80"), "not valid Unicode"),
    "long path": (_file(path="b" * 5000), "over 1024"),
    "long path in bytes": (_file(path="é" * 600), "over 1024 bytes"),
    "our own folder": (_file(path=".weightstream/manifest.json"), "own folder"),
    "our own folder below": (_file(path="b/.weightstream/x"), "own folder"),
    "path twice": (_file(path="a.bin"), "comes twice"),
    "out of order": (_file(path="A.bin"), "out of order"),
    "file and folder": (_file(path="a.bin/b"), "is a file and a folder"),
    "path of another type": (_file(path=7), "not text"),
    "negative size": (_file(size=-1), "size of 'b/c.bin'"),
    "huge size": (_file(size=1 << 200), "size of 'b/c.bin'"),
    "size that wants digests": (_file(size=1 << 61), "need"),
    "size as text": (_file(size="5"), "size of 'b/c.bin'"),
    "size as truth": (_file(size=True), "size of 'b/c.bin'"),
    "size as a fraction": (_file(size=5.0), "size of 'b/c.bin'"),
    "size as not a number": (_file(size=float("nan")), "size of 'b/c.bin'"),
    "version of another type": (_file(version=None), "version of 'b/c.bin'"),
    "long version": (_file(version="v" * 2000), "version of 'b/c.bin'"),
    "version in two lines": (_file(version="a\r\nX: y"), "version of 'b/c.bin'"),
    "one digest too few": (_file(blake3=_digests(1)), "64"),
    "one digest too many": (_file(blake3=_digests(3)), "64"),
    "half a digest": (_file(blake3=base64.b64encode(bytes(48)).decode()), "64"),
    "not base64": (_file(blake3="*" * 88), "not base64"),
    "not canonical base64": (_file(blake3=_digests(2)[:-2] + "B="), "base64"),
    "base64 of others' letters": (_file(blake3="é" * 88), "not base64"),
    "digests of another type": (_file(blake3=[0] * 64), "not text"),
    "crc as a number": (_file(crc64nvme=5), "crc64nvme"),
    "short crc": (_file(crc64nvme="abc"), "crc64nvme"),
    "crc with a sign": (_file(crc64nvme="-00000000000001f"), "crc64nvme"),
    "crc with underscores": (_file(crc64nvme="0000_0000_0000_1"), "crc64nvme"),
    "key too many": (_file(mode=0o4755), "right keys"),
    "key too few": (lambda d: d["files"][1].pop("version"), "right keys"),
    "file is a list": (lambda d: d["files"].append([]), "not an object"),
    "file is nothing": (lambda d: d["files"].append(None), "not an object"),
    "files is an object": (_top(files={}), "not a list"),
    "another format": (_top(format=2), "format 2"),
    "format of another type": (_top(format=True), "format True"),
    "chunk size of nothing": (_top(chunk_size=0), "chunk_size"),
    "chunk size of a byte": (_top(chunk_size=1), "chunk_size"),
    "negative chunk size": (_top(chunk_size=-MIB), "chunk_size"),
    "huge chunk size": (_top(chunk_size=1 << 40), "chunk_size"),
    "odd chunk size": (_top(chunk_size=MIB + 1), "chunk_size"),
    "chunk size of another type": (_top(chunk_size="1MiB"), "chunk_size"),
    "another chunk size": (_top(chunk_size=2 * MIB), "need"),
    "short signature": (_top(signature="AAAA"), "signature"),
    "signature of another type": (_top(signature=5), "signature"),
    "top key too many": (_top(extra=1), "right keys"),
    "top key too few": (lambda d: d.pop("signature"), "right keys"),
    "root of another type": (_top(root=None), "root hash"),
    "another root": (_top(root="00" * 32), "root hash"),
    "empty root": (_top(root=""), "root hash"),
}

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "a word": b"null",
    "a list": b"[]",
    "binary": bytes(range(256)),
    "not UTF-8": b'{"format": "\xff"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "cut off": b'{"format": 1, "chunk_size": 1048576, "fi',
    "deep": b"[" * 90_000,
    "deep and closed": b'{"a":' * 90_000 + b"1" + b"}" * 90_000,
    "many small values": b"[" + b"[]," * 400_000 + b"[]]",
    "an integer of a million digits": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "too large": b" " * (32 * MIB) + b"1",
    "a key twice": b'{"format": 1, "format": 1}',
    "trailing words": b'{"format": 1} {}',
    "page of a portal": b"<!doctype html><title>Please log in</title>",
}


def good() -> Document:
    """Return a valid document of two files, but for the root hash."""
    files = [
        {"path": "a.bin", "size": 5, "version": "v1", "crc64nvme": None, "blake3": _digests(1)},
        {
            "path": "b/c.bin",
            "size": MIB + 1,
            "version": "v2",
            "crc64nvme": "00000000000000ff",
            "blake3": _digests(2),
        },
    ]
    return {"format": 1, "chunk_size": MIB, "root": "", "signature": None, "files": files}


def changed(change: Change) -> bytes:
    """Return a good document after a change, as it is kept."""
    document = good()
    change(document)
    return json.dumps(document).encode()
