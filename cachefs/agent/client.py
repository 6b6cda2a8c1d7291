"""The agent as a source of bytes for the engines of other processes: loaders and mounts.

    read_into -> agent answers -> bytes in shared memory -> copied into the lease as they arrive
              \\-> no agent, it died, it is refused ------> the rest of the range from the fallback

Nothing depends on the agent's life: whatever goes wrong with it, the range is finished from the
origin, from the byte that was reached, and the agent is left alone for a few seconds.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from weightstream import metrics
from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.finding import find_agent
from weightstream.cachefs.agent.links import Link, Links
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.settings import Settings

__all__ = ["AgentPlan", "AgentSource", "Fallback", "find_agent"]

log = logging.getLogger(__name__)

REST_S = 3.0
"""How long an agent that failed is not asked: it may be starting again."""


class Fallback(Source, Protocol):
    """What is read when the agent does not help: the origin."""

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return the origin's checksum of the whole file, if it keeps one."""
        ...


class AgentSource:
    """Reads through the node's agent, or past it. Satisfies `Source`; thread-safe; close it."""

    def __init__(self, fallback: Fallback, root_uri: str, settings: Settings) -> None:
        self.name = "agent"
        self.brings = False  # it may be that there is no agent
        self._fallback = fallback
        self._root = root_uri
        self._settings = settings
        self._links = Links(settings.run_directory)
        self._rests_until_s = 0.0
        self._refuted: set[str] = set()
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into`; see `Source.read_into`."""
        done = self._read_agent(blob, start, into, transfer) if self._may_ask(blob) else 0
        if done < len(into):
            self.name = self._fallback.name
            metrics.AGENT_FALLBACK_BYTES.inc(len(into) - done)
            self._fallback.read_into(blob, start + done, into[done:], transfer)

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return the origin's own checksum: the agent's word is what it is compared with."""
        return self._fallback.checksum(blob)

    def refute(self, blob: Blob) -> None:
        """Read a blob past the agent from now on, and tell it: others ask it too."""
        self._refuted.add(blob.id)
        try:
            self._links.ask({"op": "refute", "root": self._root, **wire.blob_to_json(blob)})
        except OSError as error:
            log.info("the agent was not told that %s is wrong: %s", blob.uri, error)

    def plan(self, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> "AgentPlan":
        """Tell the agent what a flow is going to ask for; it begins by itself."""
        wanted = [(blob, extents) for blob, extents in wanted if blob.version]
        if not wanted or not self._may_ask(wanted[0][0]):
            return AgentPlan(None)
        try:
            return AgentPlan(self._links.plan(wire.plan_message(self._root, wanted)))
        except OSError as error:
            log.debug("the agent takes no plan: %s", error)
            return AgentPlan(None)

    def close(self) -> None:
        """Close idle connections. Transfers that run are not touched."""
        self._links.close()

    def _may_ask(self, blob: Blob) -> bool:
        """Say whether there is an agent that may help; without one that costs a stat(2)."""
        if not blob.version or blob.id in self._refuted or time.monotonic() < self._rests_until_s:
            return False
        return find_agent(self._settings) is not None

    def _read_agent(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> int:
        """Read as much as the agent gives; return how many bytes are valid."""
        counted = _Counted(transfer)
        link: Link | None = None
        try:
            while counted.done < len(into):
                link = self._links.take()
                self.name = "agent"
                begin = start + counted.done
                link.read(self._root, blob, begin, into[counted.done :], counted)
                self._links.give_back(link)
                link = None
        except wire.AgentBusy as error:
            log.debug("%s: not from the agent, this time: %s", blob.uri, error)
            if link is not None:
                link.close()
        except OSError as error:
            if link is not None:
                link.close()
            self._rest(blob, error)
        except BaseException:
            if link is not None:
                link.close()
            raise
        return counted.done

    def _rest(self, blob: Blob, error: OSError) -> None:
        with self._lock:
            first = time.monotonic() >= self._rests_until_s
            self._rests_until_s = time.monotonic() + REST_S
        if first:
            metrics.AGENT_FAILURES.inc()
            log.info("%s is read without the agent for now: %s", blob.uri, error)


class AgentPlan:
    """A plan that the agent holds as long as this connection lives."""

    def __init__(self, link: Link | None) -> None:
        self._link = link

    def hurry(self, blob: Blob, extent: Extent) -> None:
        """See `Plan`: the agent hears of it with the next range that it is asked for."""

    def close(self) -> None:
        """End it."""
        if self._link is not None:
            self._link.close()


class _Counted:
    """A transfer that knows how far it is."""

    def __init__(self, transfer: Transfer) -> None:
        self.done = 0
        self.step_bytes = transfer.step_bytes
        self.is_fresh = transfer.is_fresh
        self._transfer = transfer
        self.on_cancel = transfer.on_cancel

    @property
    def urgent(self) -> bool:
        """See `Transfer.urgent`."""
        return self._transfer.urgent

    def link_share(self) -> float | None:
        """See `Transfer.link_share`."""
        return self._transfer.link_share()

    def advance(self, count: int) -> None:
        """See `Transfer.advance`."""
        self.done += count
        self._transfer.advance(count)
