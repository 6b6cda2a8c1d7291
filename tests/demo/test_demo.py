"""The demo proves what it says, fails when it cannot, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from weightstream.demo.checkpoint import llama_tensors, write_checkpoint
from weightstream.demo.messages import Phase, Result
from weightstream.demo.nodes import Fetched
from weightstream.demo.show import Lane, findings, findings_of_peer

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

COMMAND = (sys.executable, "-m", "weightstream.demo", "--size", "16MiB")


def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    return {**os.environ, "TMPDIR": str(folder), "HOME": str(tmp_path)}


@pytest.mark.slow
def test_main_job(tmp_path: Path) -> None:
    picture = tmp_path / "timeline.png"
    env = environment(tmp_path)
    command = [*COMMAND, "--picture", str(picture)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "mapped" in done.stdout
    assert "second node: 91 MB in " in done.stdout
    assert ", 91 MB from its peer over TLS, " in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    env = environment(tmp_path)
    with subprocess.Popen(COMMAND, env=env, stderr=subprocess.PIPE, text=True) as demo:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "tmp").glob("*/rclone.log")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert errors.strip().endswith("interrupted")
    assert "Traceback" not in errors
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not servers_of(tmp_path)


def servers_of(folder: Path) -> list[str]:
    lines = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in lines.splitlines() if "rclone serve" in line and str(folder) in line]


def test_checkpoint_is_the_same_every_time_and_of_the_size_asked(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", 16 << 20, 3)
    two = write_checkpoint(tmp_path / "two", 16 << 20, 3)
    assert [
        a.read_bytes() == b.read_bytes() for a, b in zip(one.files, two.files, strict=True)
    ] == [True] * 3
    assert one.size_bytes == pytest.approx(16 << 20, rel=0.02)


def test_checkpoint_is_a_llama_in_valid_shards(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = write_checkpoint(tmp_path / "one", 4 << 20, 2)
    found = {name: tensor for file in made.files for name, tensor in load_file(file).items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        spec.name: spec.shape for spec in llama_tensors(4 << 20)
    }
    assert all(bool(tensor.float().isfinite().all()) for tensor in found.values())


def result(**changes: object) -> Result:
    embedding = (1.0, 0.0, 0.9, 0.1, 0.0, 1.0)
    base = Result((Phase("imports", 0, 1),), 1.0, 10, 1, {"mapped": 10}, "aa", embedding)
    return replace(base, **changes)  # type: ignore[arg-type]


def lanes(cold: Result, warm: Result, usual: Result) -> tuple[Lane, ...]:
    named = (("cold", cold), ("warm", warm), ("usual", usual))
    return tuple(Lane(title, 0.0, found) for title, found in named)


def test_findings_are_none_when_all_agree() -> None:
    assert findings(lanes(result(), result(), result())) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (result(checksum="bb"), "tensors differ"),
        (result(embedding=(1.0, 0.0, 0.9, 0.2, 0.0, 1.0)), "embedding is off"),
        (result(sources={"origin": 10}), "not from the store"),
        (result(sources={}), "not from the store"),
    ],
)
def test_findings_name_what_is_wrong(wrong: Result, message: str) -> None:
    (found,) = findings(lanes(result(), wrong, result()))
    assert message in found


FETCHED = Fetched(90 << 20, 0.5, 90 << 20, 8000, True)


def test_findings_are_none_when_all_came_from_the_peer() -> None:
    assert findings_of_peer(FETCHED) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(FETCHED, is_right=False), "other bytes"),
        (replace(FETCHED, received_bytes=82 << 20), "86 MB of 94 MB came from its peer"),
        (replace(FETCHED, origin_bytes=8 << 20), "the origin sent 8 MB"),
    ],
)
def test_findings_name_what_did_not_come_from_the_peer(wrong: Fetched, message: str) -> None:
    (found,) = findings_of_peer(wrong)
    assert message in found
