"""How peers are started: settings where they belong, secrets in nobody's argument list."""

import os
import stat
from pathlib import Path

import pytest

from weightstream.bench.errors import BenchError
from weightstream.bench.links import LOOPBACK
from weightstream.bench.mounts import peers, plan
from weightstream.bench.mounts.mounted import mounted
from weightstream.bench.mounts.peers import PEERS, SECRET_KEY, Launch, Where
from weightstream.bench.mounts.plan import Variant

VARIANTS = {
    variant.label: variant
    for cell in plan.mount_cells((LOOPBACK, plan.LINK))
    for variant in cell.variants
    if variant.peer in PEERS
}


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Where:
    monkeypatch.setattr(peers, "_program", lambda name, _: name)
    return Where("http://127.0.0.1:1", "bench", tmp_path / "mnt", tmp_path)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_secrets_are_in_no_argument_list(variant: Variant, where: Where) -> None:
    launch = PEERS[variant.peer](where, variant.options)
    assert not any(SECRET_KEY in word for word in launch.command)
    assert str(where.directory) in launch.command


def test_variants_differ_in_what_is_started(where: Where) -> None:
    started = [PEERS[v.peer](where, v.options) for v in VARIANTS.values()]
    keys = {(launch.command, tuple(launch.env.items())) for launch in started}
    assert len(keys) == len(VARIANTS)


def test_s3fs_gets_its_keys_from_a_private_file(where: Where) -> None:
    peers.s3fs_fuse(where, {})
    found = where.scratch / "passwd-s3fs"
    assert SECRET_KEY in found.read_text()
    assert stat.S_IMODE(found.stat().st_mode) == 0o600


def test_options_of_ours_are_settings(where: Where) -> None:
    launch = peers.weightstream(where, {"driver": "fuse-python", "memory_budget": "1"})
    assert launch.env["WEIGHTSTREAM_DRIVER"] == "fuse-python"
    assert launch.env["WEIGHTSTREAM_MEMORY_BUDGET"] == "1"
    assert launch.env["WEIGHTSTREAM_STORE"].startswith(str(where.scratch))


def test_missing_program_names_what_installs_it() -> None:
    with pytest.raises(BenchError, match="no-such-program is missing: apt-get"):
        peers._program("no-such-program", "apt-get install it")


def test_server_that_ends_before_it_mounts_is_told_with_its_last_words(tmp_path: Path) -> None:
    launch = Launch(("sh", "-c", "echo >&2 first; echo >&2 no such bucket; exit 1"))
    log = tmp_path / "log"
    with (
        pytest.raises(BenchError, match="not mounted: no such bucket"),
        mounted(launch, tmp_path / "mnt", dict(os.environ), log),
    ):
        pytest.fail("it is not mounted")
    assert not (tmp_path / "mnt").exists()


def test_server_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightstream.bench.mounts.mounted._MOUNTED_S", 0.2)
    launch = Launch(("sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"))
    with (
        pytest.raises(BenchError, match="not mounted"),
        mounted(launch, tmp_path / "mnt", dict(os.environ), tmp_path / "log"),
    ):
        pytest.fail("it is not mounted")
    written = tmp_path / "pid"
    if written.exists():  # else it was ended before it could say anything
        assert not Path(f"/proc/{written.read_text().strip()}").exists()
