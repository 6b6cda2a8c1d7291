"""The cluster's authority, and the certificate that each node makes for itself under it.

All members derive the authority's private key from the secret, so nothing has to be handed out: who
knows the secret can make a certificate, and nobody else can make one that members accept.
"""

import datetime
import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightstream.errors import UsageError
from weightstream.p2p.identity.secret import ClusterKeys

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

PEER_NAME = "peer.weightstream.internal"
"""What every node's certificate is for: nodes come and go at any address."""

_AUTHORITY = "authority"
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
_EARLIER = datetime.timedelta(days=1)  # for nodes whose clocks are behind
_VALID = datetime.timedelta(days=3650)  # an agent is not restarted for its certificate's sake
_BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A node's certificate and key, and the authority's certificate, in PEM. Keep it in memory."""

    authority: bytes
    certificate: bytes
    private_key: bytes

    def __repr__(self) -> str:
        return "Credentials(...)"


def make_credentials(
    keys: ClusterKeys, node: str, name: str = PEER_NAME, now: datetime.datetime | None = None
) -> Credentials:
    """Make a key, and a certificate for `name` under the cluster's authority.

    Raises `UsageError` where the package `cryptography` is missing.
    """
    try:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise UsageError(
            "encryption between peers needs the package cryptography: "
            "pip install 'weightstream[p2p]', or set peer_encryption off in a trusted network"
        ) from error
    number = int.from_bytes(keys.long_key(_AUTHORITY), "big") % (_ORDER - 1) + 1
    above = ec.derive_private_key(number, ec.SECP256R1())
    own = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(above).sign(above, hashes.SHA256())
    certificate = _node(own, above, node, name, now or _now()).sign(above, hashes.SHA256())
    pem = serialization.Encoding.PEM
    return Credentials(
        authority.public_bytes(pem),
        certificate.public_bytes(pem),
        own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """Return a context that takes TLS 1.3 from members only."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
    context.verify_mode = ssl.CERT_REQUIRED
    # Every connection proves itself anew, and no ticket lies unread in a client's socket.
    context.num_tickets = 0
    return context


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """Return a context for `PEER_NAME`, which shows the node's own certificate."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, credentials)


def _context(protocol: int, credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=credentials.authority.decode())
    # load_cert_chain takes only a path; this one is in memory and belongs to nobody else
    fd = os.memfd_create("certificate")
    try:
        os.write(fd, credentials.certificate + credentials.private_key)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _authority(above: "ec.EllipticCurvePrivateKey") -> "x509.CertificateBuilder":
    from cryptography import x509

    public = above.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(_called("weightstream cluster"))
        .issuer_name(_called("weightstream cluster"))
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _node(
    own: "ec.EllipticCurvePrivateKey",
    above: "ec.EllipticCurvePrivateKey",
    node: str,
    name: str,
    now: datetime.datetime,
) -> "x509.CertificateBuilder":
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as Use

    both = x509.ExtendedKeyUsage([Use.SERVER_AUTH, Use.CLIENT_AUTH])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(above.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_called(node[:64]))
        .issuer_name(_called("weightstream cluster"))
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _usage(*, signs_certificates: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _called(name: str) -> "x509.Name":
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
