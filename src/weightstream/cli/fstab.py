"""`mount.weightstream`: what mount(8) calls for file systems of type `weightstream`.

    # /etc/fstab
    s3://models  /mnt/models  weightstream  _netdev,nofail,allow_other,store=/nvme/weightstream  0 0

mount(8) looks for it in /sbin only: `ln -s "$(command -v mount.weightstream)" /sbin/`. It calls
`mount.weightstream ORIGIN DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`.

Options are those of `weightstream mount`: `allow_other`, any setting as `name=value`, and
`env_file=PATH`, a file of NAME=VALUE lines for credentials and endpoints, as systemd has them.
What mount(8) itself understands is passed on to helpers as well and is ignored here, for a mount is
read-only, nosuid and nodev in any case.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from weightstream.errors import UsageError

# mount(8)'s own exit codes
USAGE, FAILURE = 1, 32

_GENERIC_NAMES = """
    async atime auto defaults dev diratime dirsync exec group iversion lazytime loud mand noatime
    noauto nodev nodiratime noexec nofail noiversion nolazytime nomand norelatime nostrictatime
    nosuid nosymfollow nouser owner relatime remount ro rw silent strictatime suid sync user users
"""
_GENERIC = frozenset(_GENERIC_NAMES.split())
_GENERIC_PREFIXES = ("_netdev", "x-", "X-", "comment=", "context=", "user=", "helper=", "uhelper=")


@dataclass(slots=True)
class Options:
    """What -o said."""

    arguments: list[str] = field(default_factory=list)
    env_file: str = ""


def parse(text: str, sloppy: bool = False) -> Options:
    """Read the options of -o; raise `UsageError` for one that is none, unless `sloppy` (-s)."""
    options = Options()
    for one in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = one.partition("=")
        if one in _GENERIC or one.startswith(_GENERIC_PREFIXES):
            continue
        if one == "allow_other":
            options.arguments.append("--allow-other")
        elif name == "env_file" and value:
            options.env_file = value
        elif equals:
            options.arguments += ["-o", one]
        elif not sloppy:
            raise UsageError(f"unknown mount option {one!r}")
    return options


def read_environment(path: str) -> dict[str, str]:
    """Read NAME=VALUE lines, as systemd's EnvironmentFile: comments and quotes allowed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read env_file {path}: {error}") from error
    return dict(_variables(lines, path))


def _variables(lines: Iterable[str], path: str) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] in "#;":
            continue
        name, equals, value = text.removeprefix("export ").partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"env_file {path}, line {number}, is not NAME=VALUE")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        yield name.strip(), value


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount as mount(8) asks; return what it takes for an exit code."""
    from weightstream.cli import main as weightstream

    parser = argparse.ArgumentParser(prog="mount.weightstream", description=__doc__)
    parser.add_argument("origin")
    parser.add_argument("directory")
    parser.add_argument("-o", dest="options", action="append", default=[])
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="do not mount")
    parser.add_argument("-n", action="store_true", help="ignored: there is no mtab")
    parser.add_argument("-v", dest="verbose", action="store_true")
    parser.add_argument("-N", "-t", dest="ignored", help="ignored")
    try:
        given = parser.parse_intermixed_args(arguments)
    except SystemExit as error:
        return USAGE if error.code else 0
    try:
        options = parse(",".join(given.options), given.sloppy)
        os.environ.update(read_environment(options.env_file) if options.env_file else {})
    except UsageError as error:
        print(f"mount.weightstream: {error}", file=sys.stderr)
        return USAGE
    if given.fake:
        return 0
    said = sys.stdout if given.verbose else io.StringIO()
    with redirect_stdout(said):  # `mount` says nothing when all is well
        code = weightstream(["mount", *options.arguments, "--", given.origin, given.directory])
    return {0: 0, UsageError.exit_code: USAGE}.get(code, FAILURE)
