"""What every command shares: help, flags, exit codes, one line for an error."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Cli, check, wait_for_connection
from tests.kit.processes import Child, run_cli

from weightstream import __version__

COMMANDS = "load prefetch ls status pin unpin evict scrub doctor config".split()  # noqa: SIM905


def test_help_groups_every_command(cli: Cli) -> None:
    text = cli("--help").stdout
    for command in (*COMMANDS, "demo", "bench"):
        assert re.search(rf"^. {command} ", text, re.MULTILINE), command
    for group in ("Models", "Store", "This machine", "See for yourself"):
        assert f" {group} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_common_flags(cli: Cli, command: str) -> None:
    text = cli(command, "--help").stdout
    for flag in ("--json", "--quiet", "--verbose", "--set", "--store"):
        assert flag in text, flag


@pytest.mark.parametrize(("command", "flag"), [("demo", "--picture"), ("bench", "--peers")])
def test_demo_and_bench_take_their_own_flags(cli: Cli, command: str, flag: str) -> None:
    assert flag in cli(command, "--help").stdout
    assert "--nope" in cli(command, "--nope", code=2).stderr


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.strip() == __version__


def test_no_command_shows_the_help(cli: Cli) -> None:
    assert "Usage:" in cli(code=2).stdout


def test_starting_loads_nothing_heavy(cli: Cli) -> None:
    code = """
import sys
from weightstream.cli import main
main(["--help"])
heavy = {"torch", "fsspec", "s3fs", "botocore", "pydantic", "aiohttp", "prometheus_client"}
print(sorted(heavy & set(sys.modules)))
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, env=cli.env, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_completion_script_and_values(cli: Cli) -> None:
    assert "weightstream" in cli("--show-completion", "bash").stdout
    cli.env |= {
        "_WEIGHTSTREAM_COMPLETE": "complete_bash",
        "COMP_WORDS": "weightstream config chunk",
        "COMP_CWORD": "2",
    }
    assert cli().stdout.split() == ["chunk_size"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["conifg"], "Did you mean 'config'"),
        (["config", "--nope"], "--nope"),
        (["config", "chunk_sise"], "did you mean 'chunk_size'"),
        (["config", "-o", "chunk_size"], "KEY=VALUE"),
        (["config", "-o", "chunk_sise=1"], "did you mean 'chunk_size'"),
        (["status", "-o", "chunk_size=5000"], "bad chunk_size '5000' (from flag)"),
        (["load"], "Missing argument"),
        (["ls", "s3://"], "not an S3 URL"),
        (["evict", "--free", "much"], "bad --free 'much'"),
        (["evict", "s3://b/m", "--all"], "one of URI, --all and --free"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(cli: Cli, arguments: list[str], says: str) -> None:
    assert says in cli.error(*arguments, code=2)


def test_bad_environment_and_file_are_exit_2(cli: Cli) -> None:
    cli.env["WEIGHTSTREAM_STORR"] = "x"
    assert "did you mean 'WEIGHTSTREAM_STORE'" in cli.error("config", code=2)
    del cli.env["WEIGHTSTREAM_STORR"]
    file = Path(cli.env["HOME"]) / ".config" / "weightstream.toml"
    file.parent.mkdir()
    file.write_text("hedge = 3")
    assert f"bad hedge 3 (from {file})" in cli.error("status", code=2)


def test_json_error_is_one_document(cli: Cli) -> None:
    outcome = cli("status", "-o", "chunk_sise=1", "--json", code=2)
    document = json.loads(outcome.stdout)
    assert document["error"] == "UsageError"
    assert document["exit_code"] == 2
    assert document["message"] in outcome.stderr


def test_store_that_cannot_be_used_is_exit_6(cli: Cli) -> None:
    cli.store.mkdir()
    (cli.store / "precious").write_text("not ours")
    assert str(cli.store) in cli.error("status", code=6)
    assert (cli.store / "precious").read_text() == "not ours"


def test_unexpected_error_is_one_line_with_a_hint_and_a_log(cli: Cli, tmp_path: Path) -> None:
    """A broken installation stands for a bug: a module that raises when it is imported."""
    broken = tmp_path / "broken" / "blake3"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ZeroDivisionError('secret=hunter2hunter2')")
    cli.env["PYTHONPATH"] = f"{broken.parent}:{cli.env['PYTHONPATH']}"
    line = cli.error("status", code=70)
    assert "ZeroDivisionError" in line
    assert "WEIGHTSTREAM_LOG_LEVEL=DEBUG" in line
    assert "hunter2" not in line
    cli.env["WEIGHTSTREAM_LOG_LEVEL"] = "DEBUG"
    debugging = run_cli("status", env=cli.env)
    assert "Traceback" in debugging.stderr
    assert "hunter2" not in debugging.stderr


def test_missing_extra_names_the_command_that_installs_it(cli: Cli, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "sitecustomize.py"
    hidden.parent.mkdir()
    hidden.write_text("import sys; sys.modules['torch'] = None")
    cli.env["PYTHONPATH"] = f"{hidden.parent}:{cli.env['PYTHONPATH']}"
    line = cli.error("load", "s3://bucket/model", code=2)
    assert "pip install 'weightstream[torch]'" in line


def test_reader_that_goes_away_is_not_an_error(cli: Cli) -> None:
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-m", "weightstream.cli", "config"]
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            run, stdout=gone, stderr=subprocess.PIPE, text=True, env=cli.env, timeout=30
        )
    assert done.returncode == 141
    assert done.stderr == ""


def test_ctrl_c_is_exit_130_without_a_traceback(
    cli: Cli, start: Callable[..., Child], hanging_endpoint: str
) -> None:
    cli.env |= {"AWS_ENDPOINT_URL": hanging_endpoint, "AWS_ACCESS_KEY_ID": "a" * 16}
    cli.env |= {"AWS_SECRET_ACCESS_KEY": "b" * 16, "AWS_REGION": "us-east-1"}
    cli.env["WEIGHTSTREAM_STALL_TIMEOUT_S"] = "30"
    with start("ls", "s3://models/m", "--json") as child:
        wait_for_connection(child.pid)
        os.kill(child.pid, signal.SIGINT)
        outcome = child.result(20)
    check(outcome)
    assert outcome.returncode == 130
    assert outcome.stderr.strip() == "weightstream: cancelled"
    assert json.loads(outcome.stdout)["exit_code"] == 130
