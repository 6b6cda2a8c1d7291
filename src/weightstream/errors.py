"""Every error that leaves weightstream, in one tree.

    WeightstreamError
    ├── UsageError                 the caller asked for something that cannot be       exit 2
    ├── OriginError                the origin said no, or did not say anything         exit 3
    │   ├── NotFoundError          no such bucket, key or file (404)
    │   ├── AccessDeniedError      the origin refuses these credentials (401, 403)
    │   ├── CredentialsError       no credentials were found, or they have expired
    │   ├── ObjectChangedError     the object was replaced in mid-load (412)
    │   ├── ThrottledError         429 / 503 SlowDown, longer than the deadline
    │   ├── UnavailableError       5xx, DNS, refused, reset, stalled, longer than the deadline
    │   └── ProtocolError          an answer that breaks HTTP's or the range's rules
    ├── FormatError                a file that is not valid safetensors, or a lying index  exit 4
    ├── IntegrityError             bytes that do not match their hash or checksum      exit 5
    ├── StoreError                 the local store cannot be used                      exit 6
    │   ├── StoreFullError         no space left (the load goes on without the store)
    │   ├── StoreReadOnlyError     no permission to write it
    │   └── ForeignStoreError      the directory is not a weightstream store, or of another version
    ├── MountError                 a mount cannot be made, is busy or does not answer  exit 7
    │   └── MountBusyError         somebody has files of it open
    ├── ClusterError               Ray does not answer, or not as this version knows it     exit 8
    └── LoadCancelled              the caller closed the load while it ran              exit 130

Messages are one line and name the file, the range, the host and the cause, and never a secret.
`transient` says that the same request may succeed later: the fetch engine retries those until its
deadline. `errno` is what a file system call answers for it.
"""

import errno as _errno


class WeightstreamError(Exception):
    """Root of every error raised on purpose."""

    exit_code = 1
    errno = _errno.EIO
    transient = False


class UsageError(WeightstreamError, ValueError):
    """A bad argument, URI, setting or configuration file."""

    exit_code = 2
    errno = _errno.EINVAL


class OriginError(WeightstreamError):
    """The origin did not give what was asked for."""

    exit_code = 3


class NotFoundError(OriginError, FileNotFoundError):
    """No such bucket, key or file."""

    errno = _errno.ENOENT


class AccessDeniedError(OriginError, PermissionError):
    """The origin refuses these credentials."""

    errno = _errno.EACCES


class CredentialsError(AccessDeniedError):
    """No credentials were found, or they expired and could not be refreshed."""


class ObjectChangedError(OriginError):
    """The object was replaced by another version while it was read."""

    errno = _errno.ESTALE


class UnavailableError(OriginError):
    """The origin cannot be reached, breaks connections or answers 5xx."""

    transient = True


class ThrottledError(UnavailableError):
    """The origin asks for fewer requests; `retry_after_s` is its own wish, if it said one."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProtocolError(OriginError):
    """An answer that breaks the rules: short body, wrong Content-Range, no HTTP."""

    transient = True


class FormatError(WeightstreamError, ValueError):
    """A safetensors file or index that is not valid."""

    exit_code = 4


class IntegrityError(WeightstreamError):
    """Bytes that do not match their hash or checksum."""

    exit_code = 5


class StoreError(WeightstreamError):
    """The local store cannot be used."""

    exit_code = 6


class StoreFullError(StoreError):
    """The store's disk, or its limit, has no space left."""

    errno = _errno.ENOSPC


class StoreReadOnlyError(StoreError):
    """The store cannot be written by this user."""

    errno = _errno.EROFS


class ForeignStoreError(StoreError):
    """The directory is not a weightstream store, or one of another format version."""


class MountError(WeightstreamError):
    """A mount cannot be made, is busy or does not answer.

    What a mount's own processes report comes with the exit code of what went wrong there.
    """

    exit_code = 7

    def __init__(self, message: str, exit_code: int = 7) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MountBusyError(MountError):
    """A mount that cannot be unmounted because somebody uses it."""

    errno = _errno.EBUSY


class ClusterError(WeightstreamError):
    """The Ray cluster does not answer, refuses, or lacks what this version builds on."""

    exit_code = 8

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class LoadCancelled(WeightstreamError):
    """The caller closed the load while it ran."""

    exit_code = 130
    errno = _errno.EINTR
