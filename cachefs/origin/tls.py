"""TLS contexts with verification, as requests and botocore choose their authorities.

Of the ciphers that the system allows, AES-128-GCM comes first: 128 bits are enough for everybody,
and the same transfer costs 0.1 CPU s/GB less than with AES-256 (OpenSSL's first choice). This is
for TLS 1.2 only: Python 3.11 cannot order the suites of 1.3, where many servers choose anyway.
"""

import ssl
from pathlib import Path
from typing import TypeAlias

from weightstream.errors import UsageError

Verify: TypeAlias = bool | str | Path | ssl.SSLContext | None
"""False: no verification; a path: this CA bundle; None or True: the system's authorities."""


def make_context(
    verify: Verify = None, client_cert: str | tuple[str, str] | None = None
) -> ssl.SSLContext:
    """Return a context; OpenSSL itself honours SSL_CERT_FILE and SSL_CERT_DIR."""
    if isinstance(verify, ssl.SSLContext):
        return verify
    context = _trusting(verify)
    _prefer_aes_128(context)
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if client_cert:
        pair = (client_cert, None) if isinstance(client_cert, str) else client_cert
        context.load_cert_chain(*pair)
    return context


def _trusting(verify: bool | str | Path | None) -> ssl.SSLContext:
    if not isinstance(verify, str | Path):
        return ssl.create_default_context()
    path = Path(verify)
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise UsageError(f"{path}: the CA bundle cannot be read: {error.strerror}") from error


def _prefer_aes_128(context: ssl.SSLContext) -> None:
    """Reorder the context's own ciphers; none is added, none is lost."""
    names = [cipher["name"] for cipher in context.get_ciphers()]
    older = [name for name in names if not name.startswith("TLS_")]  # 1.3: not to be named here
    older.sort(key=lambda name: not ("AES128-GCM" in name and name.startswith("ECDHE")))
    if older:
        context.set_ciphers(":".join(older))
