"""Traces: read, written, made up, and refused with the line that is wrong."""

from pathlib import Path

import pytest

from weightstream.errors import UsageError
from weightstream.serve_integration.scaling.simulate.traces import Request, load, write

TRACE = (Request(0.5, 2.0, 100.0), Request(1.25, 0.75))


def test_csv_is_read_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    path.write_text("duration,time,user\n0.75,1.25,ann\n\n2,0.5,bob\n")
    assert load(str(path)) == (Request(0.5, 2), Request(1.25, 0.75))


def test_jsonl_is_read(tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    path.write_text('{"time": 0.5, "duration": 2, "tokens": 100}\n\n{"time":1.25,"duration":0.75}')
    assert load(str(path)) == TRACE


@pytest.mark.parametrize("name", ["one.csv", "one.jsonl"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for trace in (TRACE, load("burst:count=7,times=2", seed=5)):
        write(trace, path)
        assert load(str(path)) == trace


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "time,duration\n1,2\n3,soon\n", ":3: duration is 'soon'; it is a number"),
        ("a.csv", "time,duration\n1,2\n\n3\n", ":4: no duration"),
        ("a.csv", "at,duration\n1,2\n", ":2: no time"),
        ("a.csv", "time,duration\n1,-2\n", ":2: -2 s and 0 tokens; both are 0 or more"),
        ("a.csv", "time,duration,tokens\n1,2,-3\n", ":2: 2 s and -3 tokens; both"),
        ("a.csv", "time,duration\nnan,2\n", ":2: time is 'nan'; it is a number"),
        ("a.csv", "time,duration\n1,2\n\xff,2\n", ":3: time is"),
        ("a.jsonl", '{"time":1,"duration":2}\n\n{"time":1,\n', ":3: no JSON: "),
        ("a.jsonl", "[1, 2]\n", ":1: no JSON object"),
        ("a.jsonl", '{"time":1,"duration":[2]}\n', r":1: duration is \[2\]; it is a number"),
    ],
)
def test_what_is_no_request_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=f"^{path}{said}"):
        load(str(path))


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("time,duration\n")
    with pytest.raises(UsageError, match="the trace has no requests"):
        load(str(path))


def test_what_is_neither_file_nor_generator_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no trace 'nope': a CSV or JSONL file, or burst, ramp"):
        load("nope")


@pytest.mark.parametrize("settings", ["rate=0", "rate=x", "speed=2", "rate", "rate=inf"])
def test_bad_settings_of_a_generator_are_refused(settings: str) -> None:
    with pytest.raises(UsageError, match=f"bad '{settings}' for poisson: rate, over, seconds"):
        load(f"poisson:{settings}")


def test_a_made_up_trace_is_of_its_rate_and_its_seed() -> None:
    trace = load("poisson:rate=20,over=100,seconds=2", seed=1)
    assert trace == load("poisson:rate=20,over=100,seconds=2", seed=1)
    assert trace != load("poisson:rate=20,over=100,seconds=2", seed=2)
    assert len(trace) == pytest.approx(2000, rel=0.1)
    assert sum(one.seconds for one in trace) / len(trace) == pytest.approx(2, rel=0.1)


def test_a_ramp_rises_and_a_day_comes_back() -> None:
    def thirds(source: str, over: float) -> list[int]:
        return [
            sum(over * part / 3 <= one.at_s < over * (part + 1) / 3 for one in load(source))
            for part in range(3)
        ]

    first, second, third = thirds("ramp:to=30,over=300", 300)
    assert first < second < third
    first, second, third = thirds("daily:peak=30,over=300", 300)
    assert second > 2 * first
    assert first == pytest.approx(third, rel=0.25)


def test_bursts_come_at_once_and_again() -> None:
    trace = load("burst:count=5,times=3,every=60")
    assert [int(one.at_s // 60) for one in trace] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(one.at_s % 60 <= 0.1 for one in trace)
