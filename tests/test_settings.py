"""The settings table: precedence, refusals, provenance."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstream.errors import UsageError
from weightstream.settings import (
    Settings,
    effective,
    format_bytes,
    load_settings,
    parse_bytes,
    table,
)


@pytest.fixture(autouse=True)
def config_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the path where a configuration file would be read; there is none yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "weightstream.toml"


def source_of(name: str, **overrides: object) -> str:
    rows = {row.name: row.source for row in effective(overrides, given_by="flag")}
    return rows[name]


def test_each_source_wins_over_the_weaker_ones(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().concurrency == 0
    assert source_of("concurrency") == "default"
    config_file.write_text("concurrency = 3")
    assert load_settings().concurrency == 3
    assert source_of("concurrency") == str(config_file)
    monkeypatch.setenv("WEIGHTSTREAM_CONCURRENCY", "5")
    assert load_settings().concurrency == 5
    assert source_of("concurrency") == "WEIGHTSTREAM_CONCURRENCY"
    assert load_settings({"concurrency": 7}).concurrency == 7
    assert source_of("concurrency", concurrency=7) == "flag"


def test_constructor_reads_the_same_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_CHUNK_SIZE", "1MiB")
    assert Settings().chunk_size == 1 << 20
    assert Settings(chunk_size=2 << 20) == load_settings({"chunk_size": "2m"})


def test_settings_do_not_change_when_the_environment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    monkeypatch.setenv("WEIGHTSTREAM_CONCURRENCY", "5")
    assert settings.concurrency == 0
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(Exception, match="frozen"):
        settings.concurrency = 1


def test_config_variable_names_another_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text('write_back = "off"')
    monkeypatch.setenv("WEIGHTSTREAM_CONFIG", str(other))
    assert load_settings().write_back == "off"
    other.unlink()
    with pytest.raises(UsageError, match=r"WEIGHTSTREAM_CONFIG names .*other\.toml"):
        load_settings()


def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_CHUNK_SIZE", "")
    assert load_settings().chunk_size == 8 << 20


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("chunk_size", "4MiB", 4 << 20),
        ("chunk_size", "4m", 4 << 20),
        ("chunk_size", "1.5 MB", 3 << 19),
        ("memory_budget", "2g", 2 << 30),
        ("memory_budget", 123, 123),
        ("deadline_s", "0.25", 0.25),
        ("stall_timeout_s", 3, 3.0),
        ("write_back", False, "off"),
        ("write_back", "1", "on"),
        ("direct_io", True, "on"),
        ("fresh", "yes", True),
        ("log_level", "debug", "DEBUG"),
        ("store", "~/models", Path.home() / "models"),
        ("store", "models", Path.cwd() / "models"),
    ],
)
def test_values_are_read_as_people_write_them(name: str, value: object, parsed: object) -> None:
    assert getattr(load_settings({name: value}), name) == parsed


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("chunk_size", "70000", "multiple of 4096"),
        ("chunk_size", "5", "greater than or equal to 65536"),
        ("chunk_size", "128MiB", "less than or equal to"),
        ("chunk_size", "8 MiB please", "a size in bytes"),
        ("chunk_size", "nan", "a size in bytes"),
        ("memory_budget", -1, "greater than or equal to 0"),
        ("memory_budget", "inf", "a size in bytes"),
        ("memory_budget", True, "a size in bytes"),
        ("memory_budget", "9" * 400, "a size in bytes"),
        ("store_max_bytes", -1, "greater than or equal to 0"),
        ("store_min_free_bytes", "-1g", "a size in bytes"),
        ("concurrency", "3.5", "a whole number"),
        ("concurrency", True, "a whole number"),
        ("deadline_s", "inf", "a number of seconds"),
        ("deadline_s", 0, "greater than 0"),
        ("write_back", "maybe", "on or off"),
        ("verify", "never", "auto or always"),
        ("log_level", "LOUD", "DEBUG, INFO, WARNING or ERROR"),
        ("store", 3, "a path"),
        ("store", "", "a path"),
    ],
)
def test_bad_value_is_refused_in_one_line(name: str, value: object, cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({name: value}, given_by="flag")
    message = str(caught.value)
    assert message.startswith(f"bad {name} ")
    assert "(from flag)" in message
    assert cause in message
    assert "\n" not in message
    assert len(message) < 250


def test_bad_value_names_variable_and_file(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text("deadline_s = -1")
    with pytest.raises(UsageError, match=rf"bad deadline_s -1 \(from {config_file}\)"):
        load_settings()
    monkeypatch.setenv("WEIGHTSTREAM_DEADLINE_S", "soon")
    with pytest.raises(UsageError, match=r"bad deadline_s 'soon' \(from WEIGHTSTREAM_DEADLINE_S\)"):
        load_settings()


def test_unknown_names_are_refused_with_a_suggestion(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"'chunk_sise' .*did you mean 'chunk_size'"):
        load_settings({"chunk_sise": 1})
    config_file.write_text("writeback = true")
    with pytest.raises(UsageError, match=r"'writeback' \(from .*toml\); did you mean 'write_back'"):
        load_settings()
    config_file.unlink()
    monkeypatch.setenv("WEIGHTSTREAM_STORES", "/x")
    with pytest.raises(UsageError, match="WEIGHTSTREAM_STORES; did you mean 'WEIGHTSTREAM_STORE'"):
        load_settings()


def test_broken_file_is_refused_with_its_line(config_file: Path) -> None:
    config_file.write_text("concurrency = 1\nstore = \n")
    with pytest.raises(UsageError, match=r"weightstream.toml is not valid TOML: .*line 2"):
        load_settings()
    config_file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the configuration file"):
        load_settings()


def test_every_setting_says_what_it_is() -> None:
    for row in table():
        assert row.help.endswith("."), row.name
        assert row.kind, row.name
        assert row.default, row.name
        assert row.variable == "WEIGHTSTREAM_" + row.name.upper()


@given(st.integers(min_value=0, max_value=1 << 50))
def test_sizes_survive_formatting_when_exact(count: int) -> None:
    text = format_bytes(count)
    parsed = parse_bytes(text)
    assert isinstance(parsed, int)
    assert abs(parsed - count) <= count * 0.06


@settings(deadline=None)
@given(st.one_of(st.text(max_size=30), st.integers(), st.floats(), st.booleans()))
def test_no_value_escapes_as_another_error(value: object) -> None:
    for row in table():
        try:
            load_settings({row.name: value})
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - both outcomes are fine
