"""The control API over its unix socket and over TCP."""

import json
import socket
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from tests.cachefs.agent.conftest import AgentProcess, eventually
from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import models
from tests.kit.s3 import free_port

from weightstream.cachefs.agent import asking
from weightstream.cachefs.agent.asking import NoAgent, prefetch_there
from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.store import Store
from weightstream.errors import NotFoundError

MIB = 1 << 20
TOKEN = "a-token-of-twenty-four-chars"

StartAgent = Callable[..., AgentProcess]


def ask(
    run: Path, method: str, path: str, body: object = None, text: str | None = None
) -> tuple[int, Any]:
    """Ask over the unix socket; return status and the parsed answer."""
    connection = asking._UnixConnection(run)
    try:
        sent = text if text is not None else None if body is None else json.dumps(body)
        connection.request(method, path, sent)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, json.loads(data) if data[:1] in b"{[" else data.decode()
    finally:
        connection.close()


def test_health_status_and_metrics(scene: Scene, start_agent: StartAgent) -> None:
    run = scene.settings.run_directory
    start_agent("--allow", scene.uri)
    assert ask(run, "GET", "/healthz") == (200, {"ok": True})
    assert ask(run, "GET", "/readyz") == (200, {"ready": True})
    code, status = ask(run, "GET", "/v1/status")
    assert code == 200
    assert status["store"]["path"] == str(scene.store)
    assert status["origins"] == [scene.uri]
    assert status["fills"] == []
    assert all(mount["state"] == "foreign" for mount in status["mounts"])  # others' on this machine
    assert status["peers"] is None
    code, text = ask(run, "GET", "/metrics")
    assert code == 200
    assert "weightstream_agent_bytes_total 0.0" in text


@pytest.mark.slow
def test_a_prefetch_brings_the_model_and_tells_how_far_it_is(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(MIB))
    start_agent()
    told: list[Progress] = []
    report = prefetch_there(scene.uri, scene.settings, told.append)
    total = sum(len(data) for data in scene.files.values())
    assert report.uri == scene.uri
    assert report.bytes_total == report.bytes_fetched == total
    assert 0 < min(one.bytes_done for one in told) < total
    assert {one.bytes_total for one in told} == {total}
    with Store.open(scene.settings) as store:
        assert all(info.complete for info in store.blobs())
    again = prefetch_there(scene.uri, scene.settings)
    assert again.bytes_fetched == 0


@pytest.mark.slow
def test_two_prefetches_of_a_uri_share_one_job_and_it_outlives_one_of_them(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(MIB))
    start_agent()
    run = scene.settings.run_directory
    first = asking._UnixConnection(run)
    first.request("POST", "/v1/prefetch", json.dumps({"uri": scene.uri}))
    first.getresponse()
    reports = []
    second = threading.Thread(
        target=lambda: reports.append(prefetch_there(scene.uri + "/", scene.settings))
    )
    second.start()
    eventually(lambda: scene.proxy.body_bytes(".safetensors") > 4 * MIB)
    assert len(ask(run, "GET", "/v1/status")[1]["fills"]) == 1
    first.close()
    second.join(30)
    assert reports[0].bytes_fetched == sum(len(data) for data in scene.files.values())
    assert scene.proxy.body_bytes(".safetensors") <= 1.05 * scene.size


def test_a_prefetch_ends_when_nobody_waits_for_it(scene: Scene, start_agent: StartAgent) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(MIB // 2))
    start_agent()
    run = scene.settings.run_directory
    asked = asking._UnixConnection(run)
    asked.request("POST", "/v1/prefetch", json.dumps({"uri": scene.uri}))
    asked.getresponse()
    eventually(lambda: scene.proxy.body_bytes(".safetensors") > 2 * MIB)
    asked.close()
    eventually(lambda: ask(run, "GET", "/v1/status")[1]["fills"] == [])
    metrics = ask(run, "GET", "/metrics")[1]
    eventually(
        lambda: 'prefetches_total{outcome="cancelled"} 1.0' in ask(run, "GET", "/metrics")[1]
    )
    assert "weightstream_agent" in metrics
    assert scene.proxy.body_bytes(".safetensors") < scene.size


def test_a_prefetch_of_what_is_not_there_fails_with_the_origins_word(
    scene: Scene, start_agent: StartAgent
) -> None:
    start_agent()
    with pytest.raises(NotFoundError, match="nothing-here"):
        prefetch_there("s3://models/nothing-here", scene.settings)


def test_an_agent_with_another_store_is_not_asked(scene: Scene, start_agent: StartAgent) -> None:
    start_agent()
    scene.use(store=scene.store.with_name("another"))
    with pytest.raises(NoAgent, match="another"):
        prefetch_there(scene.uri, scene.settings)


@pytest.mark.usefixtures("s3_env")
def test_without_an_agent_a_prefetch_is_done_here(scene: Scene) -> None:
    with pytest.raises(NoAgent):
        prefetch_there(scene.uri, scene.settings)
    with Store.open(scene.settings) as store:
        report = asking.prefetch(scene.uri, scene.settings, store)
        assert report.bytes_fetched == sum(len(data) for data in scene.files.values())
        assert all(info.complete for info in store.blobs())


@pytest.mark.usefixtures("s3_env")
def test_a_prefetch_whose_agent_dies_is_finished_here(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(2 * MIB))
    agent = start_agent()

    def kill(progress: Progress) -> None:
        if progress.bytes_done > 2 * MIB:
            agent.kill()

    with Store.open(scene.settings) as store:
        report = asking.prefetch(scene.uri, scene.settings, store, kill)
        assert all(info.complete for info in store.blobs())
    assert report.bytes_total == sum(len(data) for data in scene.files.values())


def test_it_says_how_much_of_a_model_it_holds(scene: Scene, start_agent: StartAgent) -> None:
    start_agent()
    run = scene.settings.run_directory
    total = sum(len(data) for data in scene.files.values())
    path = f"/v1/models?uri={scene.uri}&uri={scene.uri}-another"
    empty = {"files": 0, "complete_files": 0, "held_bytes": 0, "total_bytes": 0}

    def models_now() -> list[dict[str, Any]]:
        code, answer = ask(run, "GET", path)
        assert code == 200
        found: list[dict[str, Any]] = answer["models"]
        return found

    assert models_now()[0] == {"uri": scene.uri} | empty
    prefetch_there(scene.uri, scene.settings)
    files = len(scene.files)
    whole = {"files": files, "complete_files": files, "held_bytes": total, "total_bytes": total}
    assert models_now() == [{"uri": scene.uri} | whole, {"uri": f"{scene.uri}-another"} | empty]
    scene.put(models.sharded(3, 6 * MIB, seed="another version"))
    prefetch_there(scene.uri, scene.settings)  # the old one stays, and does not count
    assert models_now()[0]["held_bytes"] == sum(len(data) for data in scene.files.values())


def test_pin_unpin_and_evict(scene: Scene, start_agent: StartAgent) -> None:
    start_agent()
    run = scene.settings.run_directory
    prefetch_there(scene.uri, scene.settings)
    files = len(scene.files)
    assert ask(run, "POST", "/v1/pin", {"uri": scene.uri}) == (200, {"files": files})
    with Store.open(scene.settings) as store:
        assert all(info.pinned for info in store.blobs())
    assert ask(run, "POST", "/v1/unpin", {"uri": scene.uri}) == (200, {"files": files})
    code, removed = ask(run, "POST", "/v1/evict", {"uri": scene.uri})
    assert (code, removed["files"]) == (200, files)
    code, answer = ask(run, "POST", "/v1/pin", {"uri": scene.uri})
    assert code == 409
    assert answer["exit_code"] == 6
    assert ask(run, "POST", "/v1/drain") == (200, {"draining": True})


@pytest.mark.parametrize(
    ("method", "path", "text", "code"),
    [
        ("POST", "/v1/prefetch", "{", 400),
        ("POST", "/v1/prefetch", "[]", 400),
        ("POST", "/v1/prefetch", "{}", 400),
        ("POST", "/v1/prefetch", '{"uri": 7}', 400),
        ("POST", "/v1/prefetch", '{"uri": "s3://models/m", "more": 1}', 400),
        ("POST", "/v1/evict", '{"uri": "", "free_bytes": 1}', 400),
        ("POST", "/v1/evict", '{"uri": ""}', 409),
        ("POST", "/v1/evict", '{"free_bytes": true}', 400),
        ("POST", "/v1/refresh", '{"path": "/"}', 409),
        ("POST", "/v1/pin", "[" * 60_000, 400),
        ("POST", "/v1/pin", "x" * 100_000, 413),
        ("GET", "/v1/models", None, 400),
        ("GET", "/v1/models?uri=", None, 400),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/prefetch", None, 405),
    ],
)
def test_bad_requests_are_refused(
    shared_run: Path, method: str, path: str, text: str | None, code: int
) -> None:
    found, answer = ask(shared_run, method, path, text=text)
    assert found == code, answer
    assert "\n" not in answer["error"]


def test_garbage_on_the_control_socket_hurts_nobody(shared_run: Path) -> None:
    for garbage in (b"\0" * 4096, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/pin HTTP/1.1\r\nA: " * 999):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(shared_run / "agent-control.sock"))
            sock.sendall(garbage)
            assert ask(shared_run, "GET", "/healthz")[0] == 200


def test_tcp_asks_for_the_token(scene: Scene, start_agent: StartAgent, tmp_path: Path) -> None:
    file, port = tmp_path / "token", free_port()
    file.write_text(TOKEN + "\n")
    start_agent("--api", f"127.0.0.1:{port}", "--api-token-file", str(file))

    def get(path: str, token: str | None) -> int:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    assert get("/healthz", None) == get("/readyz", None) == 200
    assert get("/v1/status", TOKEN) == get("/metrics", TOKEN) == 200
    for path in ("/v1/status", "/metrics", "/v1/nothing"):
        assert get(path, None) == get(path, TOKEN + "x") == get(path, "") == 401
    assert get("/v1/api", TOKEN) == 401  # it tells the token: on the unix socket only
    told = {"host": "127.0.0.1", "port": port, "token": TOKEN}
    assert ask(scene.settings.run_directory, "GET", "/v1/api") == (200, told)
