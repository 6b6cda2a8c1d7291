"""Which proxy, if any, a URL goes through: the rules of urllib, which s3fs and curl share."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from weightstream.cachefs.origin.urls import Url, shown, user_info
from weightstream.errors import UsageError


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. Its authorization is never part of a message."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)


def parse_proxy(text: str) -> Proxy:
    """Parse a proxy URL: `http://user:password@host:port`, or just `host:port`."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or 80
    except ValueError:
        raise UsageError("a proxy variable holds no valid URL") from None
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"unsupported proxy {shown(text)}: only http:// proxies are supported")
    return Proxy(parts.hostname, port, basic_authorization(user_info(parts)))


def basic_authorization(user: tuple[str, str] | None) -> str | None:
    """Return the value of an (Proxy-)Authorization header for user and password."""
    if user is None:
        return None
    return "Basic " + base64.b64encode(":".join(user).encode()).decode("ascii")


def choose_proxy(url: Url, proxies: Mapping[str, str], bypass: bool) -> Proxy | None:
    """Pick from a mapping scheme -> proxy URL; `bypass` says that the host is exempt."""
    text = proxies.get(url.scheme) or proxies.get("all")
    return parse_proxy(text) if text and not bypass else None


def environment_proxy(url: Url) -> Proxy | None:
    """Return the proxy that the environment wants for this URL."""
    proxies = getproxies()
    if not proxies:
        return None
    return choose_proxy(url, proxies, bool(proxy_bypass(url.netloc)))
