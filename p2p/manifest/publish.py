"""`publish`: read a model once, and write down what it is, beside it.

The manifest comes last: whoever finds it finds the torrent too. Nothing is written when the model
was not the same from the first byte read to the last.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.origin.base import StorageOptions
from weightstream.cachefs.origin.urls import shown
from weightstream.cachefs.store import Store
from weightstream.errors import ObjectChangedError, UsageError
from weightstream.p2p.manifest.hashing import HashingLanding
from weightstream.p2p.manifest.listing import list_model
from weightstream.p2p.manifest.manifest import Manifest, ManifestFile
from weightstream.p2p.manifest.parse import MAX_CHUNKS, MAX_FILES, check, encode, path_fault
from weightstream.p2p.manifest.paths import (
    FOLDER,
    MANIFEST_NAME,
    TORRENT_NAME,
    file_path,
    folder_name,
    is_ours,
)
from weightstream.p2p.manifest.reading import (
    ProgressCallback,
    landings_for,
    read_all,
    reading_settings,
)
from weightstream.p2p.manifest.signing import sign
from weightstream.p2p.manifest.torrent import (
    LEAF_BYTES,
    encode_torrent,
    torrent_file,
    unit_bytes,
)
from weightstream.p2p.manifest.webseed import web_seed
from weightstream.p2p.manifest.writing import check_writable, write_files
from weightstream.settings import Settings, format_bytes


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What was published."""

    uri: str
    files: int
    bytes_total: int
    bytes_by_source: Mapping[str, int]
    root: str
    """The root hash, in hex."""
    signed: bool
    manifest: str
    torrent: str
    web_seed: str | None
    elapsed_s: float


def publish(
    uri: str,
    settings: Settings,
    to: str | None = None,
    key: Path | None = None,
    progress: ProgressCallback | None = None,
    storage_options: StorageOptions | None = None,
    store: Store | None = None,
) -> PublishReport:
    """Write the manifest and the torrent of the model at `uri`, beside it or into the folder `to`.

    `key` is a private key for the signature; `storage_options` are the model's, and of `to` only
    when that is of the same kind; `store` may have some of the bytes. Raises `ObjectChangedError`
    when the model was changed meanwhile; nothing is written then.
    """
    began_s = time.monotonic()
    if settings.chunk_size % LEAF_BYTES:
        size = format_bytes(settings.chunk_size)
        raise UsageError(f"publish needs a chunk_size that is a multiple of 16 KiB, not {size}")
    folder = to or f"{uri.rstrip('/')}/{FOLDER}"
    check_writable(folder)
    inside = file_path(uri, folder) if to else None
    if inside is not None and not is_ours(inside):
        raise UsageError(f"{shown(folder)} is in the model: what is written would be a part of it")
    if key is not None:
        sign(b"", key)  # a key that cannot sign is found out now, and not after an hour of reading
    with _opened(uri, settings, storage_options) as model:
        model.read(store, progress)
        model.check_unchanged()
        manifest = model.manifest(key)
        seed = model.web_seed()
        torrent = model.torrent(seed)
    folder_options = storage_options if _kind(folder) == _kind(uri) else None
    files = ((TORRENT_NAME, torrent), (MANIFEST_NAME, encode(manifest)))
    write_files(folder, files, folder_options)
    return PublishReport(
        uri=model.uri,
        files=len(manifest.files),
        bytes_total=manifest.size,
        bytes_by_source=model.bytes_by_source,
        root=manifest.root.hex(),
        signed=manifest.signature is not None,
        manifest=f"{folder.rstrip('/')}/{MANIFEST_NAME}",
        torrent=f"{folder.rstrip('/')}/{TORRENT_NAME}",
        web_seed=seed,
        elapsed_s=time.monotonic() - began_s,
    )


def _opened(uri: str, settings: Settings, options: StorageOptions | None) -> "_Model":
    origin = open_origin(uri, settings, options)
    try:
        return _Model(origin, uri, reading_settings(settings, settings.chunk_size))
    except BaseException:
        origin.close()
        raise


class _Model:
    """A model while it is published."""

    def __init__(self, origin: Origin, asked: str, settings: Settings) -> None:
        self.uri = shown(asked)
        self._origin = origin
        self._asked = asked
        self._settings = settings
        self._files = self._list()
        self._hashes: dict[Blob, HashingLanding] = {}
        self.bytes_by_source: dict[str, int] = {}
        self._refuse_odd()

    def __enter__(self) -> "_Model":
        return self

    def __exit__(self, *_: object) -> None:
        self._origin.close()

    def _list(self) -> dict[str, Blob]:
        return list_model(self._origin, self._asked)

    def _refuse_odd(self) -> None:
        """Refuse what no manifest may hold, before anything is read."""
        if len(self._files) > MAX_FILES:
            raise UsageError(f"{self.uri}: {len(self._files)} files; at most {MAX_FILES} can be")
        chunks = sum(-(-blob.size // self._settings.chunk_size) for blob in self._files.values())
        if chunks > MAX_CHUNKS:
            raise UsageError(f"{self.uri}: {chunks} chunks; publish it with a larger chunk_size")
        for path, blob in self._files.items():
            if (wrong := path_fault(path)) is not None:
                raise UsageError(f"{blob.uri!a} cannot be published: its path {wrong}")
            if not blob.version:
                raise UsageError(
                    f"{blob.uri} cannot be published: {self._origin.host} names no version of it, "
                    "so nobody could tell whether it is still what was published"
                )

    def read(self, store: Store | None, progress: ProgressCallback | None) -> None:
        """Read and hash every file."""
        self._hashes = landings_for(list(self._files.values()), self._settings, torrent=True)
        done = read_all(self._hashes, self._origin, store, self._settings, progress)
        self.bytes_by_source = done.bytes_by_source

    def check_unchanged(self) -> None:
        """Raise `ObjectChangedError` when the origin lists anything else than at the start."""
        now = self._list()
        for path in sorted(now.keys() | self._files.keys()):
            before, after = self._files.get(path), now.get(path)
            if before == after:
                continue
            did = "replaced" if before and after else "added" if after else "removed"
            raise ObjectChangedError(
                f"{self.uri}: {path} was {did} while the model was read; nothing was published"
            )

    def manifest(self, key: Path | None) -> Manifest:
        """Return the manifest, signed if there is a key."""
        files = tuple(self._file(path, blob) for path, blob in self._files.items())
        plain = Manifest(self._settings.chunk_size, files, None, self._origin.uri)
        check(plain)
        if key is None:
            return plain
        return Manifest(plain.chunk_size, files, sign(plain.root, key), plain.uri)

    def _file(self, path: str, blob: Blob) -> ManifestFile:
        hashes = self._hashes[blob]
        return ManifestFile(path, blob.size, blob.version, hashes.digests, hashes.crc64nvme)

    def web_seed(self) -> str | None:
        """Return the URL from which BitTorrent clients may read it, if there is one."""
        sample = max(self._files, key=lambda path: self._files[path].size)
        return web_seed(self._origin, self._name, sample, self._files[sample], self._settings)

    def torrent(self, seed: str | None) -> bytes:
        """Return the torrent; one of files that not everybody may read is private."""
        unit = unit_bytes(self._settings.chunk_size)
        files = (
            torrent_file(path, blob.size, self._hashes[blob].units, unit)
            for path, blob in self._files.items()
        )
        return encode_torrent(self._name, files, seed, private=seed is None)

    @property
    def _name(self) -> str:
        """Return the torrent's name: the model's folder, or its only file.

        Of a torrent with a single file libtorrent leaves the folder out, whatever the name says.
        """
        only = next(iter(self._files)) if len(self._files) == 1 else "/"
        return only if "/" not in only else folder_name(self._origin.uri)


def _kind(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else "file"
