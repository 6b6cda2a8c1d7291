"""`weightstream serve simulate` as a user has it: a process of its own, without a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import Outcome, clean_env, run_cli

NAMES = ["weightstream", "Ray default", "utilisation"]


def simulate(tmp_path: Path, *arguments: str, code: int = 0) -> Outcome:
    outcome = run_cli(
        "serve",
        "simulate",
        *arguments,
        env=clean_env() | {"WEIGHTSTREAM_STORE": str(tmp_path / "store")},
    )
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    return outcome


def rows(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(simulate(tmp_path, *arguments, "--json").stdout)
    return found


def test_shows_a_row_for_each_policy(tmp_path: Path) -> None:
    lines = simulate(tmp_path, "burst").stdout.splitlines()
    assert lines[0].split()[:4] == ["policy", "accepted", "refused", "unanswered"]
    for name, line in zip(NAMES, lines[1:], strict=True):
        assert line.startswith(name)


def test_the_policys_and_the_deployments_options_count(tmp_path: Path) -> None:
    options = "--target 4 --max 8 --at-once 4 --waiting 30 --start 10".split()  # noqa: SIM905
    ours, theirs, _ = rows(tmp_path, "burst:count=40", *options)
    assert (ours["largest"], ours["accepted"], ours["rejected"]) == (8, 30, 10)
    assert (theirs["accepted"], theirs["rejected"]) == (30, 10)
    assert 10 < ours["p50_s"] < 15


def test_a_file_and_a_choice_of_policies(tmp_path: Path) -> None:
    trace = tmp_path / "day.csv"
    said = simulate(tmp_path, "poisson:rate=3,over=60", "--write", str(trace))
    assert said.stdout == ""
    assert said.stderr.endswith(f"requests written to {trace}\n")
    found = rows(tmp_path, str(trace), "--policy", "ray", "--policy", "weightstream")
    assert [one["policy"] for one in found] == ["Ray default", "weightstream"]
    assert found[0]["accepted"] == len(trace.read_text().splitlines()) - 1


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_draws_a_picture(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"burst.{ending}"
    simulate(tmp_path, "burst", "--plot", str(picture))
    assert picture.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])
    if ending == "svg":
        assert "Requests that wait" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "no trace 'nope'"),
        (["burst", "--plot", "a.gif"], "cannot draw 'a.gif'"),
        (["burst", "--target", "0"], "bad scaling policy: target is 0"),
        (["burst", "--growth", "1"], "bad scaling policy: growth is 1"),
        (["burst", "--at-once", "0"], "bad deployment to simulate: a replica takes 0"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, arguments: list[str], said: str) -> None:
    outcome = simulate(tmp_path, *arguments, code=2)
    assert outcome.stderr.startswith(f"weightstream: {said}")
    assert outcome.stdout == ""
