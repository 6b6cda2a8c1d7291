"""One table of settings: flags, WEIGHTSTREAM_* variables, the TOML file and the docs come from it.

Precedence: flag (or keyword) > environment > file > default. Parsed and validated once, then
passed as a frozen object; nothing reads the environment later.

The sources are merged here and not by pydantic-settings' own source classes, because two things are
promised that those do not give: every refusal names where the value came from, and an unknown
WEIGHTSTREAM_* variable is an error (a misspelt one would otherwise be a setting silently lost).
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from weightstream.errors import UsageError

PREFIX = "WEIGHTSTREAM_"
CONFIG_VARIABLE = "WEIGHTSTREAM_CONFIG"
PAGE = 4096  # what O_DIRECT wants of offsets, lengths and addresses

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d{1,18})(\.\d{1,9})?\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_ON_OFF = {"true": "on", "1": "on", "yes": "on", "false": "off", "0": "off", "no": "off"}


def parse_bytes(value: object) -> object:
    """Turn `64MiB`, `4g` or `1048576` into bytes (units are powers of 1024).

    Leave anything else for the validator to refuse; a bool too, which Python would take for 0 or 1.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        return value
    unit = _UNITS[match[3].lower()]
    return int(match[1]) * unit + int(float(match[2] or 0) * unit)


def format_bytes(count: int) -> str:
    """Return `8 MiB` for 8388608: the largest unit that leaves the number exact, else one digit."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            exact = count % unit == 0
            return f"{count // unit} {name}" if exact else f"{count / unit:.1f} {name}"
    return f"{count} B"


def _parse_on_off(value: object) -> object:
    text = str(value).lower()
    return _ON_OFF.get(text, text)


def _absolute(path: Path) -> Path:
    """Fix a relative path now: the process may change its directory later."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError("names an unknown home directory") from error


def _path(value: object) -> object:
    if not value or not isinstance(value, str | os.PathLike) or "\0" in str(value):
        raise ValueError("is not a path")
    return value


def _whole_pages(count: int) -> int:
    if count % PAGE:
        raise ValueError(f"must be a multiple of {PAGE}")
    return count


def _no_bool(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _home(variable: str, fallback: str) -> Path:
    """Return a base directory of the XDG specification, which says to ignore relative ones."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else Path.home() / fallback


def _run_directory() -> Path:
    """Return a directory that is empty after a restart of the machine, as mounts are gone then."""
    if os.geteuid() == 0:
        return Path("/run/weightstream")
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return (
        base / "weightstream" if base.is_absolute() else Path(f"/tmp/weightstream-{os.geteuid()}")
    )


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(lt=1 << 63)]
PageBytes = Annotated[Bytes, AfterValidator(_whole_pages)]
Count = Annotated[int, BeforeValidator(_no_bool)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
OnOff = Annotated[Literal["on", "off"], BeforeValidator(_parse_on_off)]
AutoOnOff = Annotated[Literal["auto", "on", "off"], BeforeValidator(_parse_on_off)]
Level = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(lambda text: str(text).upper())
]
Directory = Annotated[Path, BeforeValidator(_path), AfterValidator(_absolute)]


class Settings(BaseSettings):
    """The settings of one process: what is given by keyword, else environment, file, default."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True)

    store: Directory = Field(
        default_factory=lambda: _home("XDG_CACHE_HOME", ".cache") / "weightstream",
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
    chunk_size: PageBytes = Field(
        8 << 20,
        ge=64 << 10,
        le=64 << 20,
        description="Unit of caching, hashing and sharing; a multiple of 4 KiB.",
    )
    range_size: PageBytes = Field(
        8 << 20, ge=64 << 10, description="Largest run of chunks asked for in one request."
    )
    concurrency: Count = Field(
        0, ge=0, le=256, description="Parallel requests; 0 means adapt to the link."
    )
    max_concurrency: Count = Field(
        32, ge=1, le=256, description="Upper bound of the adaptive concurrency."
    )
    connect_timeout_s: Seconds = Field(5.0, gt=0, description="To open a connection, each address.")
    stall_timeout_s: Seconds = Field(
        10.0, gt=0, description="A connection without a byte for this long is given up."
    )
    deadline_s: Seconds = Field(
        60.0, gt=0, description="A range without progress for this long, retries included, fails."
    )
    hedge: OnOff = Field("on", description="Ask again for a range that lags far behind its peers.")
    share_wait_s: Seconds = Field(
        10.0,
        gt=0,
        description="Longest wait for a chunk that another process fetches, without its progress.",
    )
    listing_ttl_s: Seconds = Field(
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
    direct_io: AutoOnOff = Field(
        "auto", description="O_DIRECT for the store; auto probes the file system."
    )
    exit_flush_s: Seconds = Field(
        30.0, ge=0, description="Longest time that process exit waits for write-back."
    )
    driver: Literal["auto", "kernel", "fuse-python"] = Field(
        "auto",
        description="How to mount: `kernel` speaks to /dev/fuse itself (root), `fuse-python` works "
        "without privileges; auto takes the better one that works here.",
    )
    read_ahead: PageBytes = Field(
        16 << 20,
        ge=128 << 10,
        le=1 << 30,
        description="How far the kernel reads ahead in files of a mount that are still filling.",
    )
    fill: OnOff = Field(
        "on",
        description="In a mount: fetch whole files, and the shards behind them, once a load began.",
    )
    open_wait_s: Seconds = Field(
        1.0,
        ge=0,
        description="In a mount: longest wait of an open for a file whose fill is about to end.",
    )
    run_directory: Directory = Field(
        default_factory=_run_directory,
        description="Where this user's mounts are noted, and asked.",
    )
    agent: Literal["auto", "off"] = Field(
        "auto",
        description="Ask this user's agent on this node for bytes, where one runs; `off` never.",
    )
    peers: str = Field(
        "",
        description="The agent's peers: `host:port,host:port`, `dns:name:port`, `file:/path` or "
        "`tracker:http://host:port`; empty means none.",
    )
    peer_listen: str = Field(
        "0.0.0.0:7470", description="Where the agent serves chunks to its peers, `address:port`."
    )
    peer_address: str = Field(
        "", description="Where peers reach this agent, `host:port`; empty means its own address."
    )
    zone: str = Field(
        "", description="The node's zone (rack, availability zone); peers in it are preferred."
    )
    cluster_secret_file: str = Field(
        "",
        description="File with the secret that members of the cluster share; peers prove by it who "
        "they are, and the key of their encryption comes from it.",
    )
    peer_encryption: OnOff = Field(
        "on", description="TLS between peers; off only where the network is trusted."
    )
    peer_window: Bytes = Field(
        64 << 20, ge=1 << 20, description="Bytes in flight from all peers together."
    )
    peer_transport: Literal["exchange", "swarm"] = Field(
        "exchange",
        description="How bulk goes between peers: over HTTP, or in a swarm over BitTorrent (the "
        "extra `p2p`). A swarm costs a process, a port (`swarm_listen`) and, while a crowd loads, "
        "a second copy of the file on the store's disk; chunks come in any order, so a model's "
        "first layers come later. Single chunks that a reader waits for always go over HTTP.",
    )
    swarm_listen: str = Field(
        "0.0.0.0:7473",
        description="Where the agent takes part in swarms with `peer_transport` swarm, "
        "`address:port`.",
    )
    manifest_key_file: str = Field(
        "",
        description="File with the Ed25519 public key (PEM) that published manifests must be "
        "signed with; empty takes unsigned ones too.",
    )
    log_level: Level = Field(
        "WARNING", description="Least severe log record that the command line prints to stderr."
    )

    def __init__(self, _given_by: str = "keyword", /, **given: Any) -> None:
        inputs = _gather(given, _given_by)
        values: dict[str, Any] = {name: entry.value for name, entry in inputs.items()}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_refusal(error, inputs)) from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only what `__init__` merged."""
        return (init_settings,)


def load_settings(
    overrides: Mapping[str, object] | None = None, *, given_by: str = "keyword"
) -> Settings:
    """Return the settings of this process; `overrides` win over environment and file.

    Raises `UsageError`, in one line, for an unknown name or a value that cannot be.
    """
    return Settings(given_by, **(overrides or {}))


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table, as documentation and command line show it."""

    name: str
    kind: str
    default: str
    help: str

    @property
    def variable(self) -> str:
        """Return the environment variable that sets it."""
        return PREFIX + self.name.upper()


@dataclass(frozen=True, slots=True)
class Effective:
    """The value that one setting has, and who gave it."""

    name: str
    value: object
    text: str
    source: str


def table() -> tuple[Setting, ...]:
    """Return every setting, in the order of declaration."""
    return tuple(
        Setting(name, _kind(name), _default_text(name), field.description or "")
        for name, field in Settings.model_fields.items()
    )


def effective(
    overrides: Mapping[str, object] | None = None, *, given_by: str = "keyword"
) -> tuple[Effective, ...]:
    """Return every setting with its value and its source, such as `flag` or a variable's name."""
    settings = load_settings(overrides, given_by=given_by)
    inputs = _gather(overrides or {}, given_by)
    rows = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        source = inputs[name].source if name in inputs else "default"
        rows.append(Effective(name, value, _text(name, value), source))
    return tuple(rows)


def config_path() -> Path:
    """Return where the TOML file is looked for."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named).absolute()
    return _home("XDG_CONFIG_HOME", ".config") / "weightstream.toml"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or nothing."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, slots=True)
class _Input:
    value: object
    source: str


def _gather(given: Mapping[str, object], given_by: str) -> dict[str, _Input]:
    """Merge the sources, the weakest first; refuse names that are not in the table."""
    for name in given:
        if name not in Settings.model_fields:
            hint = did_you_mean(name, Settings.model_fields)
            raise UsageError(f"unknown setting {name!r} (from {given_by}){hint}")
    named = {name: _Input(value, given_by) for name, value in given.items()}
    return _from_file() | _from_environment() | named


def _from_environment() -> dict[str, _Input]:
    """Read WEIGHTSTREAM_*; an empty variable counts as not set, as containers often leave it."""
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    found = {}
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or not text:
            continue
        if variable not in known:
            hint = did_you_mean(variable, [*known, CONFIG_VARIABLE])
            raise UsageError(f"unknown environment variable {variable}{hint}")
        found[known[variable]] = _Input(text, variable)
    return found


def _from_file() -> dict[str, _Input]:
    path = config_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if os.environ.get(CONFIG_VARIABLE):
            raise UsageError(f"{CONFIG_VARIABLE} names {path}, which does not exist") from error
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from error
    return _parse_file(path, text)


def _parse_file(path: Path, text: str) -> dict[str, _Input]:
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    for name in values:
        if name not in Settings.model_fields:
            hint = did_you_mean(name, Settings.model_fields)
            raise UsageError(f"unknown setting {name!r} (from {path}){hint}")
    return {name: _Input(value, str(path)) for name, value in values.items()}


def _refusal(error: ValidationError, inputs: Mapping[str, _Input]) -> str:
    """Say in one line which value is refused, where it came from and why."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    entry = inputs.get(name, _Input(first["input"], "default"))
    cause = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    kind = _kind(name)
    shown = repr(entry.value)[:80]
    return f"bad {name} {shown} (from {entry.source}): {cause}; it is {_ARTICLES[kind]}"


_ARTICLES = {
    "path": "a path",
    "size": "a size in bytes, such as 8MiB",
    "count": "a whole number",
    "seconds": "a number of seconds",
    "true | false": "true or false",
    "on | off": "on or off",
    "auto | on | off": "auto, on or off",
    "auto | always": "auto or always",
    "auto | off": "auto or off",
    "exchange | swarm": "exchange or swarm",
    "text": "text",
    "auto | kernel | fuse-python": "auto, kernel or fuse-python",
    "DEBUG | INFO | WARNING | ERROR": "DEBUG, INFO, WARNING or ERROR",
}


def _kind(name: str) -> str:
    """Return the type of a setting in a user's words."""
    annotation = Settings.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if annotation is int:
        return "count" if "concurrency" in name else "size"
    names: dict[object, str] = {
        Path: "path",
        float: "seconds",
        bool: "true | false",
        str: "text",
    }
    return names[annotation]


def _text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    size = _kind(name) == "size" and isinstance(value, int) and value
    return format_bytes(size) if size else str(value)


# The real defaults name this user.
_DEFAULTS_OF_USER = {
    "store": "~/.cache/weightstream",
    "run_directory": "/run/weightstream, $XDG_RUNTIME_DIR/weightstream",
}


def _default_text(name: str) -> str:
    if name in _DEFAULTS_OF_USER:
        return _DEFAULTS_OF_USER[name]
    return _text(name, Settings.model_fields[name].default) or "none"
