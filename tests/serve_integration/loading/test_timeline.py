"""The timeline: what it draws of a load, and the table that the command prints."""

import json
from pathlib import Path

import pytest

from weightstream.serve_integration.loading.noting import ReplicaLoads
from weightstream.serve_integration.loading.phases import Phases, warmth_of
from weightstream.serve_integration.loading.picture import draw, program, weights
from weightstream.serve_integration.loading.upstream import AgentCounts, most

COLD = Phases(
    uri="s3://models/llama",
    began_at=1e9,
    process_s=1.0,
    import_s=3.0,
    header_s=1.3,
    first_byte_s=1.2,
    last_byte_s=4.0,
    to_device_s=4.5,
    ready_s=4.6,
    warmth="origin",
    bytes_total=1 << 30,
    bytes_by_source={"origin": 1 << 30},
    is_start=True,
)
WARM = Phases(
    uri="s3://models/llama",
    began_at=1e9 + 10,
    process_s=1.0,
    import_s=3.0,
    header_s=1.1,
    first_byte_s=None,
    last_byte_s=None,
    to_device_s=3.2,
    ready_s=3.3,
    warmth="memory",
    bytes_total=1 << 30,
    bytes_by_source={"mapped": 1 << 30},
    is_start=True,
)


def test_program_and_weights_run_side_by_side() -> None:
    assert [(one.name, one.start_s, one.end_s) for one in program(COLD)] == [
        ("process", 0.0, 1.0),
        ("imports", 1.0, 3.0),
        ("build, and wait", 3.0, 4.0),
        ("to device", 4.0, 4.5),
        ("assign", 4.5, 4.6),
    ]
    assert [(one.name, one.start_s, one.end_s) for one in weights(COLD)] == [
        ("find, headers", 1.0, 1.2),
        ("bytes", 1.2, 4.0),
    ]


def test_mapped_weights_have_no_bytes_to_wait_for() -> None:
    assert [one.name for one in program(WARM)] == ["process", "imports", "to device", "assign"]
    assert [one.name for one in weights(WARM)] == ["find, headers", "map"]
    assert "first_byte" not in WARM.ends()


def test_phases_survive_the_registry() -> None:
    for phases in (COLD, WARM):
        assert Phases.from_json(json.loads(json.dumps(phases.to_json()))) == phases
    assert Phases.from_json({**COLD.to_json(), "unknown": 1}) is None
    assert Phases.from_json(None) is None


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"timeline{suffix}"
    replicas = [ReplicaLoads("chat", "Llama", f"r{i}", "abc", (COLD, WARM)) for i in range(3)]
    draw(replicas, path)
    assert path.stat().st_size > 10_000
    draw([], path)


@pytest.mark.parametrize(
    ("sources", "in_memory", "expected"),
    [
        ({"origin": 9, "store": 1}, True, "origin"),
        ({"peer": 9, "origin": 3}, False, "peer"),
        ({"store": 9}, False, "disk"),
        ({"mapped": 9}, False, "disk"),
        ({"mapped": 9, "origin": 1}, True, "memory"),
        ({}, True, "origin"),
    ],
)
def test_warmth_is_where_most_bytes_came_from(
    sources: dict[str, int], in_memory: bool, expected: str
) -> None:
    assert warmth_of(sources, in_memory=in_memory) == expected


def test_what_an_agent_gave_came_from_where_it_read_most() -> None:
    before = {"origin": 100, "received": 50, "sent": 7}
    assert most(before, before | {"sent": 900}) == "store"
    assert most(before, {"origin": 105, "received": 54}) == "origin"
    assert most(before, {"origin": 105, "received": 60}) == "peer"
    assert most({}, {"received": 1}) == "peer"
    assert warmth_of({"agent": 9}, in_memory=False, upstream="origin") == "origin"
    assert warmth_of({"agent": 9}, in_memory=True, upstream="disk") == "memory"
    assert warmth_of({"mapped": 9}, in_memory=False, upstream="origin") == "disk"


def test_without_an_agent_nothing_is_asked(tmp_path: Path) -> None:
    assert AgentCounts(tmp_path).upstream() == "origin"
