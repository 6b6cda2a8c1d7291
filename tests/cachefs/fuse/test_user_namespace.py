"""R26: root of a user namespace only, as in many containers: no passthrough, the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cachefs.fuse.harness import why_not
from tests.kit.processes import clean_env

pytestmark = pytest.mark.fuse

_SCRIPT = """
import sys
from pathlib import Path
from tests.cachefs.fuse.harness import serving
from tests.cachefs.fuse.scenes import made_bytes

SIZE = 1 << 20
with serving(Path(sys.argv[1]), {"a.bin": [SIZE, "1", True], "b.bin": SIZE}) as mount:
    def right(name):
        return (mount.path / name).read_bytes() == made_bytes(name, "1", SIZE)

    assert not mount.init["passthrough"]
    assert right("a.bin") and right("b.bin")
    mount.call("complete", "b.bin")
    assert right("b.bin")
    mount.kill()
    mount.restart()
    assert right("a.bin") and right("b.bin")
    assert mount.call("server.gauges")["passthrough_files"] == 0
    assert "no passthrough" in mount.log()
"""


def test_r26_without_the_right_to_pass_files_through_they_are_read(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("user namespaces are not permitted here")
    command = [*namespace, sys.executable, "-c", _SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), timeout=100)
    assert done.returncode == 0, done.stderr
