"""Foreign exceptions and the error each becomes: one table for the boundary.

Rows are matched along the exception's MRO by qualified name, most specific first, so that the table
can speak of botocore, aiohttp and google without importing them.
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import IncompleteRead

from weightstream.cachefs.origin.responses import Asked
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    OriginError,
    ProtocolError,
    ThrottledError,
    UnavailableError,
    UsageError,
    WeightstreamError,
)

_TABLE: dict[str, type[WeightstreamError]] = {
    "builtins.FileNotFoundError": NotFoundError,
    "builtins.IsADirectoryError": NotFoundError,
    "builtins.NotADirectoryError": NotFoundError,
    "builtins.PermissionError": AccessDeniedError,
    "builtins.TimeoutError": UnavailableError,
    "builtins.OSError": UnavailableError,
    "builtins.EOFError": UnavailableError,
    "http.client.HTTPException": ProtocolError,
    "asyncio.exceptions.TimeoutError": UnavailableError,
    "fsspec.exceptions.FSTimeoutError": UnavailableError,
    "botocore.exceptions.NoCredentialsError": CredentialsError,
    "botocore.exceptions.PartialCredentialsError": CredentialsError,
    "botocore.exceptions.CredentialRetrievalError": CredentialsError,
    "botocore.exceptions.TokenRetrievalError": CredentialsError,
    "botocore.exceptions.SSOError": CredentialsError,
    "botocore.exceptions.UnauthorizedSSOTokenError": CredentialsError,
    "botocore.exceptions.ProfileNotFound": UsageError,
    "botocore.exceptions.ParamValidationError": UsageError,
    "botocore.exceptions.NoRegionError": UsageError,
    "botocore.exceptions.InvalidRegionError": UsageError,
    "botocore.exceptions.HTTPClientError": UnavailableError,
    "botocore.exceptions.ConnectionError": UnavailableError,
    "botocore.exceptions.BotoCoreError": OriginError,
    "aiohttp.client_exceptions.ClientPayloadError": ProtocolError,
    "aiohttp.client_exceptions.ClientError": UnavailableError,
    "httpx.TransportError": UnavailableError,
    "huggingface_hub.errors.RepositoryNotFoundError": NotFoundError,
    "huggingface_hub.errors.RevisionNotFoundError": NotFoundError,
    "huggingface_hub.errors.EntryNotFoundError": NotFoundError,
    "huggingface_hub.errors.LocalTokenNotFoundError": CredentialsError,
    "google.auth.exceptions.DefaultCredentialsError": CredentialsError,
    "google.auth.exceptions.RefreshError": CredentialsError,
    "google.auth.exceptions.TransportError": UnavailableError,
    "azure.core.exceptions.ClientAuthenticationError": AccessDeniedError,
    "azure.core.exceptions.ResourceNotFoundError": NotFoundError,
    "azure.core.exceptions.ResourceModifiedError": ObjectChangedError,
    "azure.core.exceptions.ServiceRequestError": UnavailableError,
    "azure.core.exceptions.ServiceResponseError": UnavailableError,
    "azure.core.exceptions.AzureError": OriginError,
    "builtins.ValueError": OriginError,
    "builtins.RuntimeError": OriginError,
    "builtins.KeyError": OriginError,
    "builtins.TypeError": OriginError,
}

# S3 error codes that s3fs turns into builtin exceptions without a type of their own.
_CODES: dict[str, type[OriginError]] = {
    "ExpiredToken": CredentialsError,
    "TokenRefreshRequired": CredentialsError,
    "RequestTimeTooSkewed": CredentialsError,
    "SlowDown": ThrottledError,
    "ServiceUnavailable": ThrottledError,
    "TooManyRequests": ThrottledError,
    "InternalError": UnavailableError,
    "NoSuchBucket": NotFoundError,
    "SignatureDoesNotMatch": AccessDeniedError,
    "InvalidAccessKeyId": AccessDeniedError,
}

_STATUSES: dict[int, type[OriginError]] = {
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: NotFoundError,
    407: AccessDeniedError,
    412: ObjectChangedError,
    429: ThrottledError,
}


@contextmanager
def translated(asked: Asked) -> Iterator[None]:
    """Turn every foreign exception of the block into one of the error tree."""
    try:
        yield
    except WeightstreamError:
        raise
    except Exception as error:
        raise translate(error, asked) from error


def translate(error: Exception, asked: Asked) -> WeightstreamError:
    """Return the error of the tree that stands for a foreign one."""
    root = _root(error)
    made = _kind(error)(asked.says(_cause(root)))
    if isinstance(root, ssl.SSLCertVerificationError):
        made.transient = False  # trying again cannot help
    return made


def _kind(error: BaseException) -> type[WeightstreamError]:
    code = _s3_code(error)
    if code in _CODES:
        return _CODES[code]
    status = _status(error)
    if status >= 400:
        return _STATUSES.get(status, UnavailableError if status >= 500 else OriginError)
    for kind in type(error).__mro__:
        found = _TABLE.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return OriginError


def _status(error: BaseException) -> int:
    """Find the HTTP status on an exception, wherever its library keeps it."""
    response = getattr(error, "response", None)
    for holder, name in (
        *((error, name) for name in ("status", "status_code", "code")),
        *((response, name) for name in ("status", "status_code")),
    ):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return 0


def _s3_code(error: BaseException) -> str:
    """Find botocore's error code on the exception, or on the one that s3fs made it from."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _root(error: Exception) -> Exception:
    """Dig out the exception that botocore and aiohttp wrap: it says best what happened."""
    for _ in range(4):
        details = getattr(error, "kwargs", None)
        inner = details.get("error") if isinstance(details, dict) else None
        for name in ("os_error", "certificate_error"):
            inner = inner or getattr(error, name, None)
        if not isinstance(inner, Exception):
            break
        error = inner
    return error


def _cause(error: Exception) -> str:
    """Say in a few words what happened."""
    match error:
        case socket.gaierror():
            return f"the host name cannot be resolved ({error.strerror})"
        case ssl.SSLCertVerificationError():
            return f"TLS verification failed ({error.verify_message})"
        case ConnectionRefusedError():
            return "connection refused"
        case ConnectionResetError() | BrokenPipeError():
            return "connection reset"
        case TimeoutError() | BlockingIOError():
            return "no byte within the stall timeout"
        case IncompleteRead():
            return "connection closed in the middle of the answer"
    code = _s3_code(error)
    text = str(error) or type(error).__name__
    return f"{code}: {text}" if code and code not in text else text
