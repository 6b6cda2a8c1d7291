"""Writes docs/CONFIGURATION.md from the settings table: `python -m weightstream.cli.docs PATH`."""

import sys
from pathlib import Path

from weightstream.settings import Setting, table

_HEAD = """\
# Configuration

<!-- Generated from src/weightstream/settings.py by `make docs`; a test fails when it is not. -->

Every setting can be given in four places. The first that has it wins:

1. a flag: `weightstream load URI -o chunk_size=4MiB` (any command, any setting, repeatable;
   `--store` for the one most used), or a keyword of `load_settings` in Python;
2. an environment variable: `WEIGHTSTREAM_CHUNK_SIZE=4MiB`; one that is empty counts as not set;
3. the file `~/.config/weightstream.toml`, or the one that `WEIGHTSTREAM_CONFIG` names:
   `chunk_size = "4MiB"`;
4. the default.

`weightstream config` shows what is in force and where each value came from. A name that is not in
this table is an error in every place, and so is a value that cannot be.

The paths that start with `~/.cache` and `~/.config` follow `XDG_CACHE_HOME` and `XDG_CONFIG_HOME`.
Sizes are in bytes or take a unit: `8388608`, `8MiB`, `8m`; units are powers of 1024.

S3's endpoint, region and credentials come from the usual `AWS_*` variables and files
(`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...), proxies from `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.
"""


def configuration() -> str:
    """Return the text of docs/CONFIGURATION.md."""
    head = "| setting | variable | type | default | meaning |\n|---|---|---|---|---|\n"
    return _HEAD + "\n" + head + "".join(_row(row) for row in table())


def _row(row: Setting) -> str:
    kind = row.kind.replace(" | ", ", ")
    return f"| `{row.name}` | `{row.variable}` | {kind} | `{row.default}` | {row.help} |\n"


def main() -> None:
    """Write the file that the first argument names."""
    Path(sys.argv[1]).write_text(configuration(), encoding="utf-8")


if __name__ == "__main__":
    main()
