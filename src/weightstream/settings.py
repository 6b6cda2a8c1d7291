"""One table of settings: flags, WEIGHTSTREAM_* variables, the TOML file and the docs come from it.

Precedence: flag (or keyword) > environment > file > default. Parsed and validated once, then
passed as a frozen object; nothing reads the environment later.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

OnOff = Literal["on", "off"]

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: object) -> object:
    """Turn `64MiB`, `4g` or `1048576` into bytes; leave anything else for pydantic to refuse."""
    if not isinstance(text, str):
        return text
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if number[-1:] in "kmgt" else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except ValueError:
        return text


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class Settings(BaseSettings):
    """The settings of one process."""

    model_config = SettingsConfigDict(env_prefix="WEIGHTSTREAM_", extra="forbid", frozen=True)

    store: Path = Field(
        default_factory=lambda: _cache_home() / "weightstream",
        description="The store's directory, shared by every process of the node.",
    )
    store_max_bytes: Bytes = Field(
        0, ge=0, description="Most that the store may hold; 0 means limited by free space only."
    )
    store_min_free_bytes: Bytes = Field(
        2 << 30, ge=0, description="Free space that the store leaves on its disk."
    )
    memory_budget: Bytes = Field(
        0,
        ge=0,
        description="Memory for in-flight ranges, write-back and staging together; "
        "0 means min(4 GiB, 1/8 of the cgroup's or machine's memory).",
    )
    write_back: OnOff = Field("on", description="Keep what is fetched in the store.")
    chunk_size: Bytes = Field(
        8 << 20,
        ge=64 << 10,
        le=64 << 20,
        description="Unit of caching, hashing and sharing; a multiple of 4 KiB.",
    )
    range_size: Bytes = Field(
        8 << 20, ge=64 << 10, description="Largest run of chunks asked for in one request."
    )
    concurrency: int = Field(
        0, ge=0, le=256, description="Parallel requests; 0 means adapt to the link."
    )
    max_concurrency: int = Field(
        32, ge=1, le=256, description="Upper bound of the adaptive concurrency."
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="To open a connection, each address.")
    stall_timeout_s: float = Field(
        10.0, gt=0, description="A connection without a byte for this long is given up."
    )
    deadline_s: float = Field(
        60.0, gt=0, description="A range without progress for this long, retries included, fails."
    )
    hedge: OnOff = Field("on", description="Ask again for a range that lags far behind its peers.")
    share_wait_s: float = Field(
        10.0,
        gt=0,
        description="Longest wait for a chunk that another process fetches, without its progress.",
    )
    listing_ttl_s: float = Field(
        60.0, ge=0, description="A listing younger than this is used without asking the origin."
    )
    fresh: bool = Field(
        False, description="Refuse stored listings: ask the origin, fail if it is unreachable."
    )
    verify: Literal["auto", "always"] = Field(
        "auto",
        description="`always` hashes stored chunks at every load; `auto` when the data file was "
        "touched since it was sealed, or the machine restarted before it was durable.",
    )
    direct_io: Literal["auto", "on", "off"] = Field(
        "auto", description="O_DIRECT for the store; auto probes the file system."
    )
    exit_flush_s: float = Field(
        30.0, ge=0, description="Longest time that process exit waits for write-back."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "WARNING", description="Least severe log record that the command line prints to stderr."
    )


def _cache_home() -> Path:
    import os

    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
