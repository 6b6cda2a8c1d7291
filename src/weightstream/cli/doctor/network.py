"""The way to an origin: listing, names, connections, TLS, the time to a first byte."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.origin.addresses import Address, resolve
from weightstream.cachefs.origin.proxies import environment_proxy
from weightstream.cachefs.origin.urls import Url
from weightstream.cli.doctor.check import Check
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    OriginError,
    WeightstreamError,
)
from weightstream.settings import Settings, format_bytes

GROUP = "origin"
_MOST_ADDRESSES = 8
_SOON_DAYS = 14

_REMEDIES: tuple[tuple[type[OriginError], str], ...] = (
    (CredentialsError, "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (AccessDeniedError, "ask for permission to list and read it (S3: ListBucket, GetObject)"),
    (NotFoundError, "check bucket and prefix, and the endpoint (AWS_ENDPOINT_URL)"),
    (OriginError, "check the endpoint (AWS_ENDPOINT_URL), the proxy and the network"),
)


class OneByte:
    """A transfer that nobody watches."""

    urgent = False
    step_bytes = 1 << 20
    is_fresh = False

    def link_share(self) -> None:
        """See `Transfer.link_share`: there is nothing to share."""

    def advance(self, count: int) -> None:
        """Ignore it."""

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Ignore it: nobody cancels."""


def checks(uri: str, settings: Settings) -> list[Check]:
    """Return the rows about the way to `uri`."""
    with closing(open_origin(uri, settings)) as origin:
        row, blob = _listing(origin, uri)
        rows = [row, *_way(origin, uri, settings)]
        if blob is not None:
            rows.append(_first_byte(origin, blob))
        return rows


def _listing(origin: Origin, uri: str) -> tuple[Check, Blob | None]:
    begun_s = time.monotonic()
    try:
        blobs = origin.list(uri)
    except WeightstreamError as error:
        remedy = next((r for kind, r in _REMEDIES if isinstance(error, kind)), "check the URI")
        return Check(GROUP, "listing", "fail", str(error), "nothing can be loaded", remedy), None
    size = format_bytes(sum(blob.size for blob in blobs))
    found = f"{len(blobs)} files, {size}, in {_ms(begun_s)}"
    return Check(GROUP, "listing", "ok", found), max(blobs, key=lambda blob: blob.size)


def _way(origin: Origin, uri: str, settings: Settings) -> list[Check]:
    """Look at names, connections and TLS, unless a proxy or no network is between."""
    if origin.host in ("", "file", "s3"):
        return []
    url = _endpoint(origin.host, plain=uri.startswith("http://"))
    proxy = environment_proxy(url)
    if proxy is not None:
        return [Check(GROUP, "proxy", "ok", f"through {proxy.host}:{proxy.port}")]
    begun_s = time.monotonic()
    try:
        addresses = resolve(url.host, url.port)
    except OSError as error:
        found, remedy = f"{url.host}: {error}", "check the name and the resolver (/etc/resolv.conf)"
        return [Check(GROUP, "addresses", "fail", found, "the origin cannot be reached", remedy)]
    found = f"{url.host}, {len(addresses)} of them, in {_ms(begun_s)}"
    rows = [Check(GROUP, "addresses", "ok", found), _connections(addresses, settings)]
    if rows[-1].status != "fail":
        rows.append(_tls(url, settings))
    return rows


def _endpoint(host: str, *, plain: bool) -> Url:
    """Return the URL behind a host that messages name; a port that is not named is TLS's."""
    return Url.parse(f"{'http' if plain else 'https'}://{host}/")


def _connections(addresses: tuple[Address, ...], settings: Settings) -> Check:
    times, causes = [], []
    for address in addresses[:_MOST_ADDRESSES]:
        begun_s = time.monotonic()
        try:
            with socket.socket(address.family, socket.SOCK_STREAM) as connection:
                connection.settimeout(settings.connect_timeout_s)
                connection.connect(address.sockaddr)
        except OSError as error:
            causes.append(f"{address.sockaddr[0]}: {error}")
        else:
            times.append(time.monotonic() - begun_s)
    if not times:
        limits, remedy = "the origin cannot be reached", "check routes and firewalls"
        return Check(GROUP, "connections", "fail", "; ".join(causes), limits, remedy)
    found = (
        f"{len(times)} of {len(times) + len(causes)} addresses, fastest {min(times) * 1e3:.1f} ms"
    )
    if causes:
        limits = f"loads try these in vain now and then: {'; '.join(causes)}"
        return Check(GROUP, "connections", "warn", found, limits, "check routes and firewalls")
    return Check(GROUP, "connections", "ok", found)


def _tls(url: Url, settings: Settings) -> Check:
    try:
        with (
            socket.create_connection((url.host, url.port), settings.connect_timeout_s) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname=url.host) as secured,
        ):
            certificate = secured.getpeercert() or {}
            version = secured.version() or "TLS"
    except ssl.SSLCertVerificationError as error:
        remedy = "set AWS_CA_BUNDLE or SSL_CERT_FILE to the certificate authority's file"
        limits = "loads fail unless the right authority is configured"
        return Check(GROUP, "tls", "warn", error.verify_message, limits, remedy)
    except OSError as error:  # SSLError is one
        if url.port == 443:
            limits, remedy = "loads over HTTPS fail", "check what listens there"
            return Check(GROUP, "tls", "warn", f"no TLS on port 443: {error}", limits, remedy)
        return Check(GROUP, "tls", "ok", "plain HTTP: about half the CPU of HTTPS, no privacy")
    return _certificate(version, str(certificate.get("notAfter", "")))


def _certificate(version: str, not_after: str) -> Check:
    left = (ssl.cert_time_to_seconds(not_after) - time.time()) / 86400
    found = f"{version}, certificate valid for {left:.0f} days"
    if left >= _SOON_DAYS:
        return Check(GROUP, "tls", "ok", found)
    return Check(GROUP, "tls", "warn", found, "loads fail after that", "renew the certificate")


def _first_byte(origin: Origin, blob: Blob) -> Check:
    """Read one byte twice: over a new connection, then over the same one."""
    times = []
    try:
        for _ in range(2):
            begun_s = time.monotonic()
            if blob.size:
                origin.read_into(blob, 0, memoryview(bytearray(1)), OneByte())
            times.append(_ms(begun_s))
    except WeightstreamError as error:
        return Check(GROUP, "first byte", "fail", str(error), "nothing can be loaded", "see above")
    return Check(GROUP, "first byte", "ok", f"{times[1]}; over a new connection {times[0]}")


def _ms(begun_s: float) -> str:
    return f"{(time.monotonic() - begun_s) * 1e3:.1f} ms"
