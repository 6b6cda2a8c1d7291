"""URLs of the data plane, and what of them may be shown or kept."""

from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urljoin, urlsplit

from weightstream.errors import UsageError

DEFAULT_PORTS = {"http": 80, "https": 443}

# Query parameters that carry an authorization: signed S3/GCS/CloudFront URLs, Azure SAS, tokens.
_SECRET_PREFIXES = ("x-amz-", "x-goog-", "aws", "google")
_SECRET_NAMES = frozenset(
    {"signature", "sig", "token", "key", "key-pair-id", "policy", "expires", "password", "secret"}
    | {"apikey", "api_key", "access_token", "auth"}
    | {"se", "sp", "sv", "sr", "st", "spr", "ss", "srt", "skoid", "sktid", "skt", "ske", "sks"}
)


@dataclass(frozen=True, slots=True)
class Url:
    """One HTTP URL, split once so that a request costs no parsing."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query, as the request line carries them."""

    @classmethod
    def parse(cls, text: str) -> "Url":
        """Split a URL; user info is dropped."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"not a valid URL: {shown(text)}: {error}") from None
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise UsageError(f"not an http(s) URL: {shown(text)}")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme], target)

    @property
    def netloc(self) -> str:
        """Return host and port, as the Host header and messages carry them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """Return what must be equal for credentials to be sent along."""
        return self.scheme, self.host, self.port

    def join(self, location: str) -> "Url":
        """Return where a Location header of an answer for this URL points."""
        return Url.parse(urljoin(str(self), location))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"


def shown(text: str) -> str:
    """Return a URL without user info and without the parameters that authorize."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return text.split("?", 1)[0].rsplit("@", 1)[-1]
    netloc = parts.netloc.rsplit("@", 1)[-1]
    return parts._replace(netloc=netloc, query=public_query(parts.query), fragment="").geturl()


def public_query(query: str) -> str:
    """Return the part of a query string that names the file and authorizes nothing."""
    pairs = parse_qsl(query, keep_blank_values=True)
    public = [(name, value) for name, value in pairs if not _is_secret(name.lower())]
    return query if len(public) == len(pairs) else urlencode(public)


def _is_secret(name: str) -> bool:
    return name in _SECRET_NAMES or name.startswith(_SECRET_PREFIXES)


def user_info(parts: SplitResult) -> tuple[str, str] | None:
    """Return user and password of a URL."""
    if parts.username is None:
        return None
    return unquote(parts.username), unquote(parts.password or "")
