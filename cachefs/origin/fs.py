"""fsspec file systems: made on first use, once per process."""

import threading
from typing import Any

from weightstream.cachefs.origin.base import StorageOptions
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.cachefs.origin.responses import Asked
from weightstream.errors import UsageError

_EXTRAS = {
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "adl": "azure",
    "hf": "hub",
}


class FileSystem:
    """Makes the file system when it is first needed, and anew in a forked child.

    fsspec's file systems live on an event loop thread, which a fork does not copy; and importing
    s3fs costs half a second, which a warm load must not pay.
    """

    def __init__(self, protocol: str, options: StorageOptions) -> None:
        self.protocol = protocol
        self._options = options
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Start afresh in a forked child."""
        self._lock = threading.Lock()
        self._made: Any = None

    def get(self, asked: Asked) -> Any:
        """Return the file system."""
        with self._lock:
            if self._made is None:
                with translated(asked):
                    self._made = _make(self.protocol, self._options, asked)
            return self._made


def _make(protocol: str, options: StorageOptions, asked: Asked) -> Any:
    # No instance cache: it would hand out a client with the credentials of an earlier moment.
    arguments = {"skip_instance_cache": True, **options}
    try:
        return _kind(protocol)(**arguments)
    except ImportError as error:
        raise UsageError(asked.says(_missing(protocol, error))) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(asked.says(error)) from error


def _kind(protocol: str) -> Any:
    if protocol == "gs":
        # The registered class asks over gRPC first what kind of bucket it is, and waits a minute
        # for the answer where only HTTP passes; the class below lists any bucket.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem
    from fsspec import get_filesystem_class

    return get_filesystem_class(protocol)


def _missing(protocol: str, error: ImportError) -> str:
    extra = _EXTRAS.get(protocol)
    if extra is None:
        return str(error)
    return f"{protocol}:// needs an extra: pip install 'weightstream[{extra}]'"
