"""Telling members something, all at once, without waiting until they have heard it."""

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from weightstream.p2p.exchange.client import PeerClient, PeerError
from weightstream.p2p.exchange.wire import WireError
from weightstream.p2p.members import Member

log = logging.getLogger(__name__)


def tell_all(
    client: PeerClient, members: Iterable[Member], path: str, message: Mapping[str, Any]
) -> None:
    """Post a message to members; who does not hear it does without."""

    def tell(member: Member) -> None:
        try:
            client.tell(member, path, message)
        except (PeerError, WireError) as error:
            log.debug("%s was not told %s: %s", member.node, path, error)

    try:
        for member in members:
            name = "weightstream-tell"
            threading.Thread(target=tell, args=(member,), daemon=True, name=name).start()
    except RuntimeError as error:  # no more threads: what this is for goes on without
        log.warning("not all members were told %s: %s", path, error)
