"""Which version of which files: the listing of a model, fresh enough and at the least cost.

A stored listing younger than `listing_ttl_s` is used without a word to the origin. After that the
origin is asked; when it cannot be reached, the stored listing serves, said once per model, unless
`fresh` refuses it. An origin that answers no is believed: only silence is covered up.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.errors import CredentialsError, NotFoundError, OriginError, StoreError
from weightstream.loader.model import ModelFiles, choose_files, model_root
from weightstream.loader.session import Session

log = logging.getLogger(__name__)

_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class Resolved:
    """The model's files, and whether the origin confirmed them just now."""

    files: ModelFiles
    confirmed: bool


def resolve(session: Session, *, ask_origin: bool = False) -> Resolved:
    """Return the files of the session's model. `ask_origin` distrusts even a young listing."""
    root = model_root(session.uri)
    stored = None if session.is_local else _young_listing(session, root)
    if stored is not None and not ask_origin and not session.settings.fresh:
        return Resolved(choose_files(session.uri, stored), confirmed=False)
    try:
        listing = session.origin.list(root)
    except OriginError as error:
        return Resolved(_offline(session, root, error), confirmed=False)
    _remember(session, root, listing)
    return Resolved(choose_files(session.uri, listing), confirmed=True)


def _young_listing(session: Session, root: str) -> tuple[Blob, ...] | None:
    stored = session.store.load_listing(root) if session.store else None
    if stored is None:
        return None
    age_s = time.time() - stored.fetched_at_s
    return stored.blobs if 0 <= age_s < session.settings.listing_ttl_s else None


def _offline(session: Session, root: str, error: OriginError) -> ModelFiles:
    """Return the stored version's files, or raise what the origin's silence means."""
    silent = error.transient or isinstance(error, CredentialsError)
    if not silent or isinstance(error, NotFoundError) or session.settings.fresh:
        raise error
    stored = session.store.load_listing(root) if session.store else None
    if stored is None:
        raise error
    if root not in _told:
        _told.add(root)
        age_s = max(0.0, time.time() - stored.fetched_at_s)
        log.warning("using the stored version of %s, listed %.0f s ago: %s", root, age_s, error)
    return choose_files(session.uri, stored.blobs)


def _remember(session: Session, root: str, listing: Sequence[Blob]) -> None:
    store = session.store
    if store is None or not store.writable or session.settings.write_back == "off":
        return
    try:
        store.save_listing(root, tuple(listing))
    except StoreError as error:
        log.debug("listing of %s not kept: %s", root, error)
