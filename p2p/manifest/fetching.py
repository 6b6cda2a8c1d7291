"""Fetch a published manifest through an origin, with everything bounded: size, tries, time."""

import random
import time

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.retry import delay_s
from weightstream.cachefs.origin import Origin
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    WeightstreamError,
)
from weightstream.p2p.manifest.manifest import Manifest
from weightstream.p2p.manifest.parse import check_size, parse
from weightstream.p2p.manifest.paths import manifest_uri


class _Whole:
    """The `Transfer` of one small read that nobody cancels."""

    urgent = False
    step_bytes = 1 << 20
    is_fresh = False

    def link_share(self) -> None:
        """See `Transfer.link_share`: a small read needs no bound."""

    def advance(self, count: int) -> None:
        """Ignore it: only the whole counts."""

    def on_cancel(self, callback: object) -> None:
        """Ignore it: the origin's own time limits end the read."""


def fetch_manifest(
    origin: Origin, model_uri: str, deadline_s: float, where: str | None = None
) -> Manifest:
    """Return the manifest of a model: the one beside it, or the one at `where`.

    `origin` is that of `where`, if it is given, else the model's. Raises `NotFoundError` when there
    is none, `FormatError` or `IntegrityError` when it is not valid.
    """
    where = where or manifest_uri(model_uri)
    return parse(read_small(origin, where, deadline_s), model_uri, where)


def find_manifest(origin: Origin, model_uri: str, deadline_s: float) -> Manifest | None:
    """Return the manifest beside a model, or None where there is none.

    A file that may not be listed is refused as if it were secret: that is none as well.
    """
    try:
        return fetch_manifest(origin, model_uri, deadline_s)
    except CredentialsError:
        raise
    except (NotFoundError, AccessDeniedError):
        return None


def read_small(origin: Origin, uri: str, deadline_s: float) -> bytes:
    """Return a small file's bytes; what may pass is tried again until the deadline."""
    until_s = time.monotonic() + deadline_s
    failures = 0
    while True:
        try:
            return _read(origin, uri)
        except WeightstreamError as error:
            idle_s = deadline_s - (until_s - time.monotonic())
            wait_s = delay_s(error, failures, idle_s, deadline_s, random.random())
            if wait_s is None:
                raise
        failures += 1
        time.sleep(wait_s)


def _read(origin: Origin, uri: str) -> bytes:
    blob = _the_file(origin, uri)
    check_size(blob)
    body = bytearray(blob.size)
    if blob.size:
        origin.read_into(blob, 0, memoryview(body), _Whole())
    return bytes(body)


def _the_file(origin: Origin, uri: str) -> Blob:
    listing = origin.list(uri)
    if len(listing) != 1 or listing[0].name != uri.rsplit("/", 1)[-1]:
        raise NotFoundError(f"{uri}: not a file")
    return listing[0]
