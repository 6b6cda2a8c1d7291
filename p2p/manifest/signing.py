"""Ed25519 signatures of root hashes; keys are PEM files.

`openssl genpkey -algorithm ed25519` makes a private key, `openssl pkey -pubout` the public one that
everybody else gets.
"""

from pathlib import Path
from typing import Any

from weightstream.errors import IntegrityError, UsageError
from weightstream.p2p.manifest.manifest import Manifest

_CONTEXT = b"weightstream manifest root\0"  # so that a signature of it is one of nothing else
_MAX_KEY_BYTES = 64 << 10


def sign(root: bytes, key: Path) -> bytes:
    """Return the signature of a root hash by the private key in a file."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = _load(key, private=True)
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{key}: not an Ed25519 private key")
    return private.sign(_CONTEXT + root)


def check_signature(manifest: Manifest, key: Path, where: str) -> None:
    """Raise `IntegrityError` unless the manifest is signed with the public key in a file."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public = _load(key, private=False)
    if not isinstance(public, Ed25519PublicKey):
        raise UsageError(f"{key}: not an Ed25519 public key")
    if manifest.signature is None:
        raise IntegrityError(f"{where}: the manifest is not signed, and {key} wants it to be")
    try:
        public.verify(manifest.signature, _CONTEXT + manifest.root)
    except InvalidSignature:
        raise IntegrityError(f"{where}: the manifest is not signed with {key}") from None


def _load(path: Path, *, private: bool) -> Any:
    """Read a PEM file. What is in it never gets into a message."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    kind = "private" if private else "public"
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror or error}") from error
    try:
        if private:
            return serialization.load_pem_private_key(text, password=None)
        return serialization.load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # TypeError: a key under a password, which a job without a terminal cannot ask for
        raise UsageError(f"{path}: not an unencrypted {kind} key in PEM form") from None
