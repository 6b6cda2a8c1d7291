"""The cluster's secret, and the keys that are derived from it."""

import hashlib
import hmac
import os
import stat
from pathlib import Path

from weightstream.errors import UsageError
from weightstream.settings import Settings

LEAST_SECRET_BYTES = 16
_MOST_SECRET_BYTES = 64 << 10

# A server shows its certificate to whoever asks, so a guess at the secret can be tried without
# asking the cluster again. 16 MiB and some 40 ms a guess, once per process for us.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 14, 8, 1
_SALT = b"weightstream cluster secret 1"


class ClusterKeys:
    """What all members derive alike from the secret; one key for each purpose."""

    def __init__(self, secret: bytes) -> None:
        self._root = hashlib.scrypt(
            secret, salt=_SALT, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, dklen=64
        )

    def key(self, purpose: str) -> bytes:
        """Return the 32 bytes of a purpose."""
        return self.long_key(purpose)[:32]

    def long_key(self, purpose: str) -> bytes:
        """Return the 64 bytes of a purpose: HKDF-Expand (RFC 5869) with SHA-512, one block."""
        return hmac.digest(self._root, purpose.encode() + b"\x01", hashlib.sha512)


def read_keys(settings: Settings) -> ClusterKeys | None:
    """Return the keys of the setting `cluster_secret_file`; None when it names no file.

    Raises `UsageError` for a file that is missing, empty, too short, or open to every user.
    """
    if not settings.cluster_secret_file:
        return None
    return ClusterKeys(_read(Path(settings.cluster_secret_file)))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(_MOST_SECRET_BYTES + 1).strip()
    except OSError as error:
        cause = error.strerror or error
        raise UsageError(f"cannot read cluster_secret_file {path}: {cause}") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UsageError(
            f"cluster_secret_file {path} is open to every user (mode {stat.S_IMODE(mode):o}): "
            "chmod 600 it; in a Kubernetes secret volume, set defaultMode: 0400"
        )
    if not secret:
        raise UsageError(f"cluster_secret_file {path} is empty")
    if len(secret) < LEAST_SECRET_BYTES:
        raise UsageError(
            f"cluster_secret_file {path} holds {len(secret)} bytes, fewer than "
            f"{LEAST_SECRET_BYTES}: `openssl rand -hex 32` makes a good one"
        )
    if len(secret) > _MOST_SECRET_BYTES:
        raise UsageError(f"cluster_secret_file {path} holds more than {_MOST_SECRET_BYTES} bytes")
    return secret
