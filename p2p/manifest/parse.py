"""The manifest as a file: JSON, with the digests of a file as one base64 string.

What is parsed comes from a bucket that others may write to, so nothing in it is believed: every
type, range, count and path is checked, and what an attacker may cost is bounded before the JSON is
parsed (32 MiB hold the digests of 6 TB in chunks of 8 MiB). Paths become file names on whatever
machine restores them, so none may leave the model's folder.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from weightstream.cachefs.blob import Blob
from weightstream.errors import FormatError, IntegrityError
from weightstream.p2p.manifest.manifest import (
    DIGEST_BYTES,
    FORMAT,
    Manifest,
    ManifestFile,
    chunk_count,
)
from weightstream.p2p.manifest.paths import is_ours

MAX_BYTES = 32 << 20
MAX_FILES = 100_000
MAX_CHUNKS = 500_000
"""That surely fit, beside as many names as are usual; 4 TB in chunks of 8 MiB."""

_MAX_PATH_BYTES = 1024
_MAX_VERSION_CHARS = 1024
_MAX_SIZE = 1 << 62
_SIGNATURE_BYTES = 64
_CRC = re.compile(r"[0-9a-f]{16}")
_KEYS = frozenset({"format", "chunk_size", "root", "signature", "files"})
_FILE_KEYS = frozenset({"path", "size", "version", "crc64nvme", "blake3"})

_Refuse = Callable[[str], NoReturn]


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as it is kept; FormatError for one that `parse` would refuse."""
    check(manifest)
    signature = manifest.signature
    content = {
        "format": FORMAT,
        "chunk_size": manifest.chunk_size,
        "root": manifest.root.hex(),
        "signature": None if signature is None else _base64(signature),
        "files": [_row(file) for file in manifest.files],
    }
    body = json.dumps(content, indent=1).encode()
    if len(body) > MAX_BYTES:
        raise FormatError(f"{manifest.uri}: its manifest has {len(body)} bytes, over {MAX_BYTES}")
    return body


def _row(file: ManifestFile) -> dict[str, object]:
    return {
        "path": file.path,
        "size": file.size,
        "version": file.version,
        "crc64nvme": None if file.crc64nvme is None else f"{file.crc64nvme:016x}",
        "blake3": _base64(file.digests),
    }


def parse(body: bytes, uri: str, where: str = "") -> Manifest:
    """Return the manifest of the model `uri`; `where` names the file in messages.

    Raises `FormatError` for what is no manifest, `IntegrityError` when its root hash is not its.
    """
    return _Parser(where or uri).parse(body, uri)


class _Parser:
    def __init__(self, where: str) -> None:
        self._where = where

    def parse(self, body: bytes, uri: str) -> Manifest:
        content = self._object(self._decode(body), _KEYS, "it")
        if content["format"] != FORMAT or type(content["format"]) is not int:
            self._refuse(f"format {_shown(content['format'])} instead of {FORMAT}")
        chunk_size = self._integer(content["chunk_size"], "chunk_size")
        rows = content["files"]
        if not isinstance(rows, list):
            self._refuse("files is not a list")
        _check_chunk_size(chunk_size, self._refuse)  # before counts are worked out with it
        files = tuple(self._file(row, chunk_size) for row in rows)
        signature = self._signature(content["signature"])
        manifest = Manifest(chunk_size, files, signature, uri)
        _check(manifest, self._refuse)
        if content["root"] != manifest.root.hex():
            raise IntegrityError(
                f"{self._where}: the manifest says root hash {_shown(content['root'])}, "
                f"its content has {manifest.root.hex()}"
            )
        return manifest

    def _decode(self, body: bytes) -> object:
        if len(body) > MAX_BYTES:
            self._refuse(f"{len(body)} bytes, over {MAX_BYTES}")
        # An empty list costs 3 bytes here and 64 in memory.
        if body.count(b"[") + body.count(b"{") > 2 * MAX_FILES:
            self._refuse("too many values")
        try:
            return json.loads(body.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            self._refuse(str(error))

    def _object(self, value: object, keys: frozenset[str], name: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self._refuse(f"{name} is not an object")
        if value.keys() != keys:
            odd = sorted(value.keys() ^ keys)
            self._refuse(f"{name} has not the right keys: {_shown(', '.join(odd))}")
        return value

    def _file(self, row: object, chunk_size: int) -> ManifestFile:
        fields = self._object(row, _FILE_KEYS, "a file")
        path = self._text(fields["path"], "path", "a file")
        name = _shown(path)
        size = self._integer(fields["size"], f"size of {name}")
        return ManifestFile(
            path=path,
            size=size,
            version=self._text(fields["version"], "version", name),
            digests=self._bytes(fields["blake3"], f"blake3 of {name}"),
            crc64nvme=self._crc(fields["crc64nvme"], name),
        )

    def _integer(self, value: object, name: str) -> int:
        if type(value) is not int or not 0 <= value <= _MAX_SIZE:
            self._refuse(f"{name} is {_shown(value)}")
        return value

    def _text(self, value: object, key: str, name: str) -> str:
        if not isinstance(value, str):
            self._refuse(f"{key} of {name} is {_shown(value)}, not text")
        return value

    def _bytes(self, value: object, name: str) -> bytes:
        if not isinstance(value, str):
            self._refuse(f"{name} is not text")
        try:
            found = base64.b64decode(value.encode("ascii"), validate=True)
        except ValueError:
            self._refuse(f"{name} is not base64")
        if _base64(found) != value:
            self._refuse(f"{name} is not canonical base64")
        return found

    def _crc(self, value: object, name: str) -> int | None:
        if value is None:
            return None
        if isinstance(value, str) and _CRC.fullmatch(value):
            return int(value, 16)
        self._refuse(f"crc64nvme of {name} is {_shown(value)}, not 16 hex digits")

    def _signature(self, value: object) -> bytes | None:
        return None if value is None else self._bytes(value, "signature")

    def _refuse(self, what: str) -> NoReturn:
        raise FormatError(f"{self._where}: not a manifest: {what}")


def check(manifest: Manifest) -> None:
    """Raise `FormatError` when a manifest could not be read again, naming what is wrong."""

    def refuse(what: str) -> NoReturn:
        raise FormatError(f"{manifest.uri or 'manifest'}: {what}")

    _check_chunk_size(manifest.chunk_size, refuse)
    _check(manifest, refuse)


def _check_chunk_size(chunk_size: int, refuse: _Refuse) -> None:
    if chunk_size % 4096 or not 64 << 10 <= chunk_size <= 64 << 20:
        refuse(f"chunk_size {chunk_size} is not a multiple of 4096 from 64 KiB to 64 MiB")


def _check(manifest: Manifest, refuse: _Refuse) -> None:
    if len(manifest.files) > MAX_FILES:
        refuse(f"{len(manifest.files)} files, over {MAX_FILES}")
    signature = manifest.signature
    if signature is not None and len(signature) != _SIGNATURE_BYTES:
        refuse(f"the signature has {len(signature)} bytes instead of {_SIGNATURE_BYTES}")
    before = ""
    folders: set[str] = set()
    for file in manifest.files:
        if (wrong := path_fault(file.path)) is not None:
            refuse(f"path {_shown(file.path)} {wrong}")
        if file.path <= before:
            same = file.path == before
            refuse(f"path {_shown(file.path)} {'comes twice' if same else 'is out of order'}")
        before = file.path
        folders.update(_folders(file.path))
        if (wrong := _text_fault(file.version, _MAX_VERSION_CHARS)) is not None:
            refuse(f"version of {_shown(file.path)} {wrong}")
        _check_counts(file, manifest.chunk_size, refuse)
    for file in manifest.files:
        if file.path in folders:
            refuse(f"path {_shown(file.path)} is a file and a folder")


def _check_counts(file: ManifestFile, chunk_size: int, refuse: _Refuse) -> None:
    wanted = chunk_count(file.size, chunk_size) * DIGEST_BYTES
    if len(file.digests) != wanted:
        name = _shown(file.path)
        refuse(f"blake3 of {name} has {len(file.digests)} bytes, {file.size} bytes need {wanted}")


def _folders(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def path_fault(path: str) -> str | None:
    """Return why a path may not be a model's file; None when it may."""
    if (wrong := _text_fault(path, _MAX_PATH_BYTES)) is not None:
        return wrong
    if path.startswith("/"):
        return "is absolute"
    parts = path.split("/")
    if ".." in parts:
        return "leads out of the model"
    if "" in parts or "." in parts:
        return "has an empty component"
    if len(path.encode()) > _MAX_PATH_BYTES:
        return f"has over {_MAX_PATH_BYTES} bytes"
    return "is of weightstream's own folder" if is_ours(path) else None


def _text_fault(text: str, most: int) -> str | None:
    if len(text) > most:
        return f"has over {most} characters"
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in text):
        return "holds a control character"
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        return "is not valid Unicode"
    return None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _shown(value: object) -> str:
    """Return a value as a message shows it: bounded, and in one line."""
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def check_size(blob: Blob) -> None:
    """Refuse what is too large to be a manifest before it is fetched."""
    if blob.size > MAX_BYTES:
        raise FormatError(f"{blob.uri}: not a manifest: {blob.size} bytes, over {MAX_BYTES}")
