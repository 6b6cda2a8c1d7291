"""What members say chunks are: asked where bytes came another way than with their hash.

To know a hash is one thing, to stand by what one sent another: pieces in the swarm are passed on
before they are checked, so who passed on wrong ones may know the right hash by now.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightstream.p2p.exchange.client import PeerClient
from weightstream.p2p.exchange.wire import WireError
from weightstream.p2p.members import Member

MOST_CHUNKS = 256
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Vouched:
    """A member's answer."""

    digests: Mapping[int, bytes] = field(default_factory=dict)
    """BLAKE3 of the chunks that it has."""
    stands_by: frozenset[int] = frozenset()
    """Chunks of which it passed nothing wrong on in the swarm, it says."""


def ask_digests(
    client: PeerClient, member: Member, blob_id: str, chunk_size: int, chunks: Iterable[int]
) -> Vouched:
    """Ask a member about chunks, the first `MOST_CHUNKS` of them; raises `PeerError`."""
    asked = list(chunks)[:MOST_CHUNKS]
    question = {"blob": blob_id, "chunk_size": chunk_size, "chunks": asked}
    said = client.tell(member, "/v1/digests", question)
    digests, stands_by = said.get("digests"), said.get("stands_by")
    known = digests if isinstance(digests, dict) else {}
    named = stands_by if isinstance(stands_by, list) else []
    return Vouched(
        {i: digest for i in asked if (digest := _digest(known.get(str(i))))},
        frozenset(i for i in asked if i in named),
    )


def answer(digests: Mapping[int, bytes | None], stands_by: Iterable[int]) -> Mapping[str, Any]:
    """Return what a member says."""
    known = {str(i): digest.hex() for i, digest in digests.items() if digest}
    return {"digests": known, "stands_by": list(stands_by)}


def parse_question(message: Mapping[str, Any]) -> tuple[str, int, list[int]]:
    """Return blob id, chunk size and chunks of a question; WireError for anything else."""
    blob_id, chunk_size = message.get("blob"), message.get("chunk_size")
    chunks = message.get("chunks")
    if not isinstance(blob_id, str) or not isinstance(chunk_size, int):
        raise WireError("a question without names")
    if not isinstance(chunks, list) or len(chunks) > MOST_CHUNKS:
        raise WireError("a question without chunks, or with too many")
    if not all(isinstance(i, int) and i >= 0 for i in chunks):
        raise WireError("a question with odd chunks")
    return blob_id, chunk_size, chunks


def _digest(text: object) -> bytes | None:
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return None
    return digest if len(digest) == _DIGEST_BYTES else None
