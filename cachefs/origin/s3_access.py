"""What botocore knows about a bucket: its URL, the region that signs, the credentials, the CA."""

import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.cachefs.origin.fs import FileSystem
from weightstream.cachefs.origin.http import Authorize, anonymous
from weightstream.cachefs.origin.proxies import Proxy, choose_proxy, environment_proxy
from weightstream.cachefs.origin.quiet_gc import quiet_gc
from weightstream.cachefs.origin.responses import Asked
from weightstream.cachefs.origin.tls import make_context
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import CredentialsError

# botocore renews temporary credentials 10-15 minutes before they expire, when it is asked; asking
# costs a trip to s3fs' event loop (0.1 ms, more when that is busy), so not at every request.
ASK_AGAIN_S = 30.0
CONNECT_BUDGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Access:
    """How to read from one bucket."""

    base: str
    """URL of the bucket in virtual or path addressing, as botocore's endpoint rules chose."""
    region: str
    signed: bool
    direct: bool
    """False: the data plane does not speak what this bucket wants; s3fs reads it."""
    headers: Mapping[str, str]
    credentials: Any = field(repr=False)
    fetched_at_s: float

    def url(self, key: str) -> Url:
        """Return the URL of a key."""
        return Url.parse(f"{self.base}/{quote(key, safe='/-_.~')}")

    def listing_url(self, query: str) -> Url:
        """Return the URL of the bucket with a query."""
        return Url.parse(f"{self.base}?{query}")

    def authorize(self, asked: Asked) -> Authorize:
        """Return what signs requests; the credentials are those of this moment."""
        if not self.signed:
            return anonymous
        if self.credentials is None:
            raise CredentialsError(
                asked.says("no AWS credentials were found (for a public bucket: anon=True)")
            )
        return _Signer(self)


class _Signer:
    """Signs with SigV4, in the headers. Never for another domain than the bucket's own."""

    def __init__(self, access: Access) -> None:
        from botocore.auth import S3SigV4Auth

        self._auth = S3SigV4Auth(access.credentials, "s3", access.region)
        self._home = Url.parse(access.base).host

    def __call__(self, method: str, url: Url, headers: dict[str, str]) -> Mapping[str, str]:
        from botocore.awsrequest import AWSRequest

        if not _same_service(self._home, url.host):
            return headers
        # Only what S3 must trust is signed: proxies and gateways may touch Accept-Encoding.
        signed = {name: value for name, value in headers.items() if name.lower() in _SIGNED}
        request = AWSRequest(method=method, url=str(url), headers=signed)
        self._auth.add_auth(request)
        return headers | dict(request.headers.items())


_SIGNED = frozenset({"range", "if-match", "x-amz-request-payer", "x-amz-checksum-mode"})


def _same_service(home: str, host: str) -> bool:
    """Tell whether a redirect stays with the service that may see the session token."""
    return host == home or (home.endswith(_AWS) and host.endswith(_AWS))


_AWS = (".amazonaws.com", ".amazonaws.com.cn")


class AccessBook:
    """Access by bucket, fetched from s3fs when it is first needed or grew old. Thread-safe."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Start empty in a forked child: the parent may have held the lock."""
        self._lock = threading.Lock()
        self._known: dict[str, Access] = {}

    def get(self, bucket: str, asked: Asked) -> Access:
        """Return how to read from a bucket."""
        access = self._known.get(bucket)
        if access is None or time.monotonic() - access.fetched_at_s > ASK_AGAIN_S:
            with self._lock:  # one thread asks, the others take its answer
                access = self._known.get(bucket, access)
                if access is None or time.monotonic() - access.fetched_at_s > ASK_AGAIN_S:
                    access = self._known[bucket] = self._ask(bucket, asked)
        return access

    def renew(self, bucket: str, asked: Asked, refused: Access) -> Access:
        """Return access with other credentials than the refused ones, if there are any."""
        from fsspec.asyn import sync

        with self._lock:  # a burst of refusals renews once
            access = self._known.get(bucket, refused)
            if access.credentials is refused.credentials:
                fs = self._fs.get(asked)
                sync(fs.loop, _renew, fs, bucket, timeout=CONNECT_BUDGET_S)
                access = self._known[bucket] = self._ask(bucket, asked)
        return access

    def _ask(self, bucket: str, asked: Asked) -> Access:
        from fsspec.asyn import sync

        fs = self._fs.get(asked)
        with quiet_gc():
            access = sync(fs.loop, _describe, fs, bucket, timeout=CONNECT_BUDGET_S)
        assert isinstance(access, Access)
        return access


async def _renew(fs: Any, bucket: str) -> None:
    """Make s3fs look for credentials again: environment, files, metadata service."""
    await fs.set_session(refresh=True)
    client = await fs.get_s3(bucket)
    credentials = client._get_credentials()
    refresh = getattr(credentials, "_refresh", None)
    if refresh is not None:
        await refresh()


async def _describe(fs: Any, bucket: str) -> Access:
    await fs.set_session()
    client = await fs.get_s3(bucket)
    operation = client.meta.service_model.operation_model("GetObject")
    context: dict[str, Any] = {}
    # The call that botocore makes for each request. Presigned URLs are no substitute: they name the
    # global endpoint, which redirects.
    base, _ = (
        await client._resolve_endpoint_ruleset(operation, {"Bucket": bucket, "Key": "k"}, context)
    )[:2]
    credentials = client._get_credentials()
    frozen = await credentials.get_frozen_credentials() if credentials else None
    kind = context.get("auth_type")
    special = any(name.startswith("SSECustomer") for name in fs.s3_additional_kwargs)
    return Access(
        base=base.rstrip("/"),
        region=context.get("signing", {}).get("region") or client.meta.region_name,
        signed=kind != "none",
        direct=kind in ("none", "v4", "s3v4") and not special,
        headers={"x-amz-request-payer": "requester"} if fs.req_kw.get("RequestPayer") else {},
        credentials=frozen,
        fetched_at_s=time.monotonic(),
    )


def tls_context(fs: FileSystem, asked: Asked) -> ssl.SSLContext:
    """Return a context that verifies as s3fs does: same CA bundle, same client certificate."""
    session = getattr(fs.get(asked).s3._endpoint, "http_session", None)
    certificate = getattr(session, "_cert_file", None)
    key = getattr(session, "_key_file", None)
    pair = (certificate, key) if certificate and key else certificate
    return make_context(getattr(session, "_verify", True), pair)


def proxy_for(fs: FileSystem, asked: Asked, url: Url) -> Proxy | None:
    """Return the proxy that botocore would use: its own configuration, else the environment."""
    configured = fs.get(asked).s3.meta.config.proxies
    return environment_proxy(url) if configured is None else choose_proxy(url, configured, False)
