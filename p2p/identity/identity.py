"""The identity of a running node."""

import hashlib
import secrets
import ssl
from dataclasses import dataclass, field

from weightstream.errors import UsageError
from weightstream.p2p.identity.certificates import (
    Credentials,
    client_context,
    make_credentials,
    server_context,
)
from weightstream.p2p.identity.name import node_name
from weightstream.p2p.identity.secret import ClusterKeys, read_keys
from weightstream.p2p.identity.signing import Signer
from weightstream.settings import Settings

MOST_ZONE_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is to its peers. Thread-safe."""

    node: str
    zone: str
    instance: str
    """Another one for each process: tells a node met twice from two nodes of one name."""
    keys: ClusterKeys | None = field(repr=False)
    """None without a secret."""
    signer: Signer | None = field(repr=False)
    """Signs where there is no TLS: every request with encryption off, and a tracker's."""
    _server: ssl.SSLContext | None = field(repr=False)
    _client: ssl.SSLContext | None = field(repr=False)

    def server_context(self) -> ssl.SSLContext | None:
        """Return what accepts members by mutual TLS 1.3; None when encryption is off."""
        return self._server

    def client_context(self) -> ssl.SSLContext | None:
        """Return what connects to `PEER_NAME`, as a member; None when encryption is off."""
        return self._client

    def sign(self, method: str, path: str) -> str | None:
        """Return a request's Authorization header; None when it needs none.

        With encryption on it needs none: the handshake has proved who asks, and needs no clocks
        that agree.
        """
        return self.signer.sign(method, path) if self.signer and not self._server else None

    def refusal(self, header: str | None, method: str, path: str) -> str | None:
        """Return why a request is refused; None when it is fine, or came through TLS."""
        if self.signer is None or self._server is not None:
            return None
        return self.signer.refusal(header, method, path)

    def key(self, purpose: str) -> bytes:
        """Return 32 bytes that every member derives alike.

        Without a secret they are no secret either, but still the same for everybody.
        """
        if self.keys is None:
            return hashlib.sha256(b"weightstream without a secret: " + purpose.encode()).digest()
        return self.keys.key(purpose)

    def credentials(self, name: str) -> Credentials:
        """Make another certificate, for `name`, under the cluster's authority.

        Raises `UsageError` without a secret.
        """
        if self.keys is None:
            raise UsageError("a certificate needs the setting cluster_secret_file")
        return make_credentials(self.keys, self.node, name)


def open_identity(settings: Settings) -> Identity:
    """Return this node's identity; its name is made on first use.

    Raises `UsageError` for a secret that cannot be used, or encryption without one, `StoreError`
    when the store cannot be used.
    """
    keys = read_keys(settings)
    if settings.peer_encryption == "on" and keys is None:
        raise UsageError(
            "encryption between peers needs a secret; set cluster_secret_file to a file with the "
            "same 16 bytes or more on every node (`openssl rand -hex 32`), or peer_encryption off "
            "in a trusted network"
        )
    if len(settings.zone) > MOST_ZONE_CHARACTERS or not settings.zone.isprintable():
        raise UsageError(f"bad zone: it is a name of {MOST_ZONE_CHARACTERS} characters at most")
    node = node_name(settings.store)
    signer = Signer(keys.key("requests"), node) if keys else None
    if keys is None or settings.peer_encryption != "on":
        instance = secrets.token_hex(16)
        return Identity(node, settings.zone, instance, keys, signer, None, None)
    own = make_credentials(keys, node)
    instance = instance_of(ssl.PEM_cert_to_DER_cert(own.certificate.decode()))
    return Identity(
        node, settings.zone, instance, keys, signer, server_context(own), client_context(own)
    )


def instance_of(certificate: bytes) -> str:
    """Return the instance that a certificate (DER) belongs to."""
    return hashlib.sha256(certificate).hexdigest()[:32]
