"""What is in deploy/ fits this version: its commands, flags, settings, paths and probes."""

import configparser
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from weightstream.cli.app import app
from weightstream.settings import Settings

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
yaml: Any = pytest.importorskip("yaml")


def flags_of(command: str) -> set[str]:
    """Return the flags that a command knows."""
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {flag for parameter in found.params for flag in parameter.opts}


def documents() -> dict[str, Any]:
    """Return the objects of the DaemonSet's file by kind."""
    text = (DEPLOY / "kubernetes" / "agent-daemonset.yaml").read_text()
    return {one["kind"]: one for one in yaml.safe_load_all(text) if one}


def settings_in(text: str) -> set[str]:
    return {name.lower() for name in re.findall(r"\bWEIGHTSTREAM_([A-Z_]+)", text)}


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*.*")), ids=lambda path: path.name)
def test_every_setting_named_exists(file: Path) -> None:
    assert settings_in(file.read_text()) <= set(Settings.model_fields)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_units_start_what_there_is(file: Path) -> None:
    unit = configparser.RawConfigParser(strict=False, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(file.read_text())
    service = unit["Service"]
    assert service["Type"] == "notify"
    words = service["ExecStart"].split()
    assert words[:2] == ["/usr/bin/env", "weightstream"]
    assert {word for word in words if word.startswith("--")} <= flags_of(words[2])
    assert service["RestartPreventExitStatus"] == "2"
    mounts = [word for word in re.findall(r"--[a-z-]+", file.read_text().split("[Unit]")[0])]
    assert set(mounts) - {"--now"} <= flags_of(words[2])


def test_the_agents_unit_leaves_mounts_alone() -> None:
    text = (DEPLOY / "weightstream-agent.service").read_text()
    assert "\nKillMode=process\n" in text
    assert "\nRuntimeDirectoryPreserve=yes\n" in text


def test_the_daemonset_runs_an_agent_that_knows_its_flags() -> None:
    pod = documents()["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["weightstream"]
    command, *given = container["args"]
    assert command == "agent"
    assert {one.partition("=")[0] for one in given} <= flags_of("agent")


def test_the_daemonset_hangs_together() -> None:
    found = documents()
    assert set(found) == {"Secret", "Service", "DaemonSet"}
    spec = found["DaemonSet"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]
    assert found["Service"]["spec"]["clusterIP"] == "None"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    service = found["Service"]["metadata"]["name"]
    assert env["WEIGHTSTREAM_PEERS"] == f"dns:{service}:{ports['peers']}"
    assert env["WEIGHTSTREAM_PEER_ADDRESS"] == f"$(POD_IP):{ports['peers']}"
    assert f"--api=0.0.0.0:{ports['api']}" in container["args"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert env["WEIGHTSTREAM_STORE"] == mounts["store"]
    assert env["WEIGHTSTREAM_RUN_DIRECTORY"] == mounts["run"]
    keys = set(found["Secret"]["stringData"])
    given = dict(one.partition("=")[::2] for one in container["args"])
    files = (env["WEIGHTSTREAM_CLUSTER_SECRET_FILE"], given["--api-token-file"])
    assert {os.path.split(one) for one in files} == {(mounts["secret"], key) for key in keys}
    assert volumes["secret"]["secret"]["secretName"] == found["Secret"]["metadata"]["name"]


def test_probes_ask_what_needs_no_token() -> None:
    (container,) = documents()["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    paths = {
        container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "liveness", "readiness")
    }
    assert paths == {"/healthz", "/readyz"}


def test_it_is_not_privileged_unless_it_mounts() -> None:
    (container,) = documents()["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert "privileged" not in container["securityContext"]
    assert not any(one.startswith("--mount") for one in container["args"])
