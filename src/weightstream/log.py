"""Log records without secrets.

Nothing in weightstream writes a secret into a message; this is the last line of defence for what
comes from elsewhere: a botocore exception that quotes a signed URL, a repr that holds storage
options. Two nets: the shapes that credentials have, and the very values that this process was given
in its environment.

A library must not configure logging, so `get_logger` puts the filter on the logger itself, where it
acts whatever handlers the application has. The command line calls `configure`.
"""

import logging
import os
import re
import sys
from typing import TextIO

MASK = "***"

# Environment variables whose value is a secret. Read here, and not through the settings, because
# these names belong to the clouds' own tools; the values are compared with, never kept or used.
_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
_SHORTEST_SECRET = 8  # a shorter value would mask ordinary words

_KEYS = (
    r"x-amz-(?:signature|credential|security-token)|aws_?access_?key_?id|aws_?secret_?access_?key"
    r"|aws_?session_?token|x-goog-(?:signature|credential)|signature|credential|sig|account_?key"
    r"|shared_?access_?key|access_?token|session_?token|security_?token|api_?key|client_?secret"
    r"|secret|secret_?key|password|passwd|token"
)
_VALUE = r"[^\s&,;'\"<>)}\]]+"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # scheme://user:password@host, where a password may hold slashes but a port is no password;
    # scheme://token@host
    (re.compile(r"(?<=://)[^/\s@:'\"]+:(?!\d+/)[^\s'\"<>]*@"), f"{MASK}@"),
    (re.compile(r"(?<=://)[^/\s@:'\"]+@"), f"{MASK}@"),
    # Authorization: Bearer abc, Authorization: AWS4-HMAC-SHA256 Credential=..., Signature=...
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)[^\r\n'\"]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {MASK}"),
    # signature=value, "secret": "value"; `key` only as fsspec's option, for every file has a key
    (re.compile(rf"(?i)(\b(?:{_KEYS})['\"]?\s*[=:]\s*['\"]?){_VALUE}"), rf"\1{MASK}"),
    (re.compile(rf"((['\"])key\2\s*[=:]\s*['\"]){_VALUE}"), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA|AGPA)[A-Z0-9]{12,}\b"), MASK),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bya29\.[\w-]{16,}"), MASK),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"), MASK),  # a JSON web token
)


def mask_secrets(text: str) -> str:
    """Return the text with everything that looks like a credential replaced by `***`."""
    for variable in _SECRET_VARIABLES:
        value = os.environ.get(variable, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class SecretFilter(logging.Filter):
    """Masks the finished message of a record, and the text of its exception."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record in place; always keep it."""
        record.msg, record.args = mask_secrets(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = mask_secrets(record.exc_text)
        return True


_FILTER = SecretFilter()  # one object: addFilter ignores what is there already


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, which masks secrets before any handler sees the record."""
    logger = logging.getLogger(name)
    logger.addFilter(_FILTER)
    return logger


def configure(level: str, stream: TextIO | None = None, *, dated: bool = False) -> None:
    """Print records of weightstream at `level` and above, and others' warnings, to stderr."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_FILTER)
    moment = "%(asctime)s " if dated else ""
    layout = f"{moment}%(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(layout, datefmt="%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level)))
    logging.getLogger("weightstream").setLevel(level)
