"""Blobs on local disk, shared by every process of the node: see docs/design/0001-store.md."""

from weightstream.cachefs.store.info import BlobInfo
from weightstream.cachefs.store.listing import StoredListing
from weightstream.cachefs.store.scrub import ScrubReport
from weightstream.cachefs.store.state import ChunkState
from weightstream.cachefs.store.stats import StoreStats
from weightstream.cachefs.store.store import Store
from weightstream.cachefs.store.stored import StoredBlob

__all__ = [
    "BlobInfo",
    "ChunkState",
    "ScrubReport",
    "Store",
    "StoreStats",
    "StoredBlob",
    "StoredListing",
]
