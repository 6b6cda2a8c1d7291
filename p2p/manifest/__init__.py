"""Published models: the manifest of their chunks' hashes, and the torrent beside it."""

from weightstream.p2p.manifest.known import Manifests
from weightstream.p2p.manifest.manifest import Manifest, ManifestFile
from weightstream.p2p.manifest.publish import PublishReport, publish
from weightstream.p2p.manifest.verify import VerifyReport, WrongChunk, verify

__all__ = [
    "Manifest",
    "ManifestFile",
    "Manifests",
    "PublishReport",
    "VerifyReport",
    "WrongChunk",
    "publish",
    "verify",
]
