"""Progress goes to stderr: a bar on a terminal, lines elsewhere, nothing with --quiet."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.kit.models import plain
from tests.kit.s3 import S3Server

from weightstream.cachefs.fetch import Progress
from weightstream.cli.base import Cli as Run
from weightstream.cli.base import Flags
from weightstream.cli.progress import Meter, source_mix


def on_a_terminal(cli: Cli, *arguments: str) -> tuple[str, str]:
    """Run a command whose stderr is a terminal; return (stdout, what the terminal got)."""
    master, slave = pty.openpty()
    run = [sys.executable, "-m", "weightstream.cli", *arguments]
    env = cli.env | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=slave, text=True, env=env) as child:
        os.close(slave)
        shown = b""
        try:
            while data := os.read(master, 65536):
                shown += data
        except OSError:
            pass  # the terminal's other side is closed
        finally:
            os.close(master)
        assert child.stdout is not None
        said = child.stdout.read()
        assert child.wait(30) == 0, shown
    return said, shown.decode()


def test_bar_on_a_terminal(s3_cli: Cli, s3: S3Server) -> None:
    s3.put_files("models/bar", plain(8 << 20))
    said, shown = on_a_terminal(s3_cli, "prefetch", "s3://models/bar")
    assert "8.0 MiB" in said
    assert "\x1b" not in said
    assert "bar" in shown
    assert "━" in shown
    assert "MB/s" in shown or "origin" in shown


def test_quiet_on_a_terminal_shows_nothing(s3_cli: Cli, s3: S3Server) -> None:
    s3.put_files("models/bar", plain(8 << 20))
    said, shown = on_a_terminal(s3_cli, "prefetch", "s3://models/bar", "--quiet")
    assert "8.0 MiB" in said
    assert shown == ""


def test_lines_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.cli.progress._LINE_EVERY_S", 0.0)
    progress = Progress(25, 100, {"origin": 15, "store": 10})
    with Meter(Run(Flags()), "model") as meter:
        meter.update(progress)
    assert capsys.readouterr().err == "model: 25 % of 100 bytes origin 60 %, store 40 %\n"
    with Meter(Run(Flags(quiet=True)), "model") as meter:
        meter.update(progress)
    assert capsys.readouterr().err == ""


def test_source_mix_leaves_out_what_gave_nothing() -> None:
    assert source_mix(Progress(0, 10)) == ""
    assert source_mix(Progress(9, 10, {"store": 9, "origin": 0})) == "store 100 %"


def test_load_goes_on_when_the_bar_is_on_a_terminal(s3_cli: Cli, s3: S3Server) -> None:
    s3.put_files("models/bar", plain(8 << 20))
    said, _ = on_a_terminal(s3_cli, "load", "s3://models/bar")
    assert "tensors ready" in said
    assert Path(s3_cli.store).exists()
