"""A cluster whose nodes Ray's own autoscaler starts and ends, as processes of this machine.

The provider is Ray's fake one, named as an external module: the wheel lacks the example file that
its own name would read. Nodes have two CPUs; there are never more than two of them.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from tests.kit.s3 import free_port

MOST_NODES = 2
NODE_CPUS = 2
HEAD = "ray.head.default"  # the provider knows the head by this name alone
_START_S = 90.0
_IDLE_MINUTES = 0.05


@contextlib.contextmanager
def autoscaling_cluster() -> Iterator[str]:
    """Start the cluster and connect to it; return its address."""
    import psutil  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        address = f"{_ip()}:{free_port()}"
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *_line(address, folder)],
            env=os.environ | _environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _connect(address)
            yield address
        finally:
            ray.shutdown()
            for process in _processes(psutil, head.pid, folder):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            head.wait(30)


def _line(address: str, folder: str) -> list[str]:
    config = Path(folder, "autoscaler.json")
    config.write_text(json.dumps(_config(address)), encoding="utf-8")
    port = address.rpartition(":")[2]
    return [
        *("start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=0"),
        *(f"--autoscaling-config={config}", "--include-dashboard=false"),
        *("--object-store-memory=100000000", "--disable-usage-stats"),
    ]


def _config(address: str) -> dict[str, Any]:
    nodes = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": NODE_CPUS, "object_store_memory": 100 << 20},
            "node_config": {},
            "max_workers": MOST_NODES,
        },
    }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": _head_id(),
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup")
    starts = ("head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": MOST_NODES,
        "provider": provider,
        "head_node_type": HEAD,
        "available_node_types": nodes,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{name}_commands": [] for name in (*commands, *starts)}


def _environment() -> dict[str, str]:
    return {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_CLOUD_INSTANCE_ID": _head_id(),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _head_id(),
        "RAY_enable_autoscaler_v2": "1",
    }


def _head_id() -> str:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    return str(FAKE_HEAD_NODE_ID)


def _ip() -> str:
    from ray._private.services import get_node_ip_address

    return str(get_node_ip_address())


def _connect(address: str) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        except (ConnectionError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _processes(psutil: Any, head: int, folder: str) -> set[Any]:
    """Return the cluster's processes: all have its folder on their command line, or a parent so."""
    found = [process for process in psutil.process_iter() if _is_of(psutil, process, head, folder)]
    children: set[Any] = set()
    for process in found:
        with contextlib.suppress(psutil.Error):
            children.update(process.children(recursive=True))
    return children | set(found)


def _is_of(psutil: Any, process: Any, head: int, folder: str) -> bool:
    try:
        named = any(folder in word for word in process.cmdline())
        return process.pid == head or (named and process.pid != os.getpid())
    except psutil.Error:
        return False
