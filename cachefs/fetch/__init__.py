"""The fetch engine: what to fetch next, from whom, into which buffer.

A reader states what it `Wanted`; the process's `Engine` turns that into a `Flow` of pieces, claims
them one by one (from the store when they are there, else from the source, one flow or process per
chunk), and lands them in the memory that the reader's `Landing` hands out.
"""

from weightstream.cachefs.fetch.engine import Engine, process_engine
from weightstream.cachefs.fetch.flow import Flow
from weightstream.cachefs.fetch.landing import Landing, Lease, Priority, Wanted
from weightstream.cachefs.fetch.progress import Progress
from weightstream.cachefs.fetch.slabs import Slab, SlabPool

__all__ = [
    "Engine",
    "Flow",
    "Landing",
    "Lease",
    "Priority",
    "Progress",
    "Slab",
    "SlabPool",
    "Wanted",
    "process_engine",
]
