"""`weightstream config`: what is in force, and who said so."""

from pathlib import Path

import pytest
from tests.cli.conftest import Cli

from weightstream.settings import format_bytes, table


def test_each_source_is_named(cli: Cli) -> None:
    file = Path(cli.env["HOME"]) / ".config" / "weightstream.toml"
    file.parent.mkdir()
    file.write_text('verify = "always"\nconcurrency = 3\n')
    cli.env["WEIGHTSTREAM_HEDGE"] = "off"
    report = cli.json("config", "-o", "concurrency=5", "--store", "/tmp/elsewhere")
    rows = {row["name"]: (row["value"], row["source"]) for row in report["settings"]}
    assert rows["concurrency"] == (5, "flag")
    assert rows["store"] == ("/tmp/elsewhere", "flag")
    assert rows["hedge"] == ("off", "WEIGHTSTREAM_HEDGE")
    assert rows["verify"] == ("always", str(file))
    assert rows["range_size"] == (8 << 20, "default")
    assert set(rows) == {row.name for row in table()}
    assert report["file_exists"]


def test_effective_budget_is_shown(cli: Cli) -> None:
    report = cli.json("config")
    assert report["memory_budget_bytes"] > 0
    shown = f"0 = {format_bytes(report['memory_budget_bytes'])} here"
    assert shown in cli("config").stdout


def test_one_value_for_scripts(cli: Cli) -> None:
    assert cli("config", "chunk-size").stdout == "1 MiB\n"
    assert cli.json("config", "chunk_size")["value"] == 1 << 20
    assert cli("config", "store").stdout == f"{cli.store}\n"


@pytest.mark.parametrize(
    ("flags", "level"), [([], "WARNING"), (["-q"], "ERROR"), (["-v"], "INFO"), (["-vv"], "DEBUG")]
)
def test_verbosity_sets_the_log_level(cli: Cli, flags: list[str], level: str) -> None:
    assert cli("config", "log_level", *flags).stdout.strip() == level
