"""When the origin is silent, and this node has never listed the model: what its peers remember.

The loader itself goes on with a listing that its store has; this gives the store one.
"""

import sys

from weightstream.errors import CredentialsError, NotFoundError, OriginError, WeightstreamError
from weightstream.loader.model import model_root
from weightstream.loader.session import Session
from weightstream.log import get_logger

log = get_logger(__name__)


def borrow_listing(session: Session, error: OriginError) -> bool:
    """Have the store of this node remember what a peer's does; say whether there is more now.

    Not when the origin has answered no, when only its own word counts (`fresh`), or outside of Ray.
    """
    silent = error.transient or isinstance(error, CredentialsError)
    if not silent or isinstance(error, NotFoundError) or session.settings.fresh:
        return False
    return _is_connected() and _borrow(session)


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _borrow(session: Session) -> bool:
    from ray.exceptions import RayError

    from weightstream.serve_integration.nodes.listings import listing_of_peers

    root, store = model_root(session.uri), session.store
    if store is None or not store.writable or store.load_listing(root) is not None:
        return False
    try:
        found = listing_of_peers(root)
        if found is not None:
            store.save_listing(root, found.blobs)
    except (WeightstreamError, RayError) as error:
        log.info("no peer says which files %s has: %s", root, error)
        return False
    return found is not None
