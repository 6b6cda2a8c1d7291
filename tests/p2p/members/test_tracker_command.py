"""`weightstream tracker` as a process."""

import os
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.kit.processes import Child
from tests.p2p.identity.conftest import SecretFactory


def tracker(*arguments: str) -> Child:
    return Child(
        [sys.executable, "-m", "weightstream.cli", "tracker", *arguments], dict(os.environ)
    )


def test_it_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    with tracker("--listen", "127.0.0.1:0", "--store", str(tmp_path / "store")) as child:
        child.wait_for(lambda: "the tracker listens at" in child.stderr())
        warned = "no cluster_secret_file: whoever reaches this port"
        child.wait_for(lambda: warned in child.stderr())
        found = re.search(r"listens at 127.0.0.1:(\d+)", child.stderr())
        assert found is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/v1/members", timeout=5) as answer:
            assert answer.status == 200
        os.kill(child.pid, signal.SIGTERM)
        outcome = child.result(10)
    assert outcome.returncode == 0
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("listen", "mode", "cause"),
    [("nowhere", 0o600, "bad --listen"), ("127.0.0.1:0", 0o644, "open to every user")],
)
def test_bad_orders_are_refused(
    listen: str, mode: int, cause: str, secret_file: SecretFactory
) -> None:
    secret = secret_file(mode=mode)
    with tracker("--listen", listen, "-o", f"cluster_secret_file={secret}") as child:
        outcome = child.result(20)
    assert outcome.returncode == 2
    assert cause in outcome.stderr
    assert "Traceback" not in outcome.stderr
