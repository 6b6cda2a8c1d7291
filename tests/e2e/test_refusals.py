"""What the origin refuses or cannot give: the right error, in one line, without secrets."""

import socket
import time

import pytest
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f
from tests.kit.processes import run_cli
from tests.kit.s3 import SECRET_KEY, free_port, storage_options

from weightstream import load
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
    WeightstreamError,
)

WEIGHTS = f.When(key=".safetensors", method="GET", ranged=True, times=None)


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/model", "s3://models/no-such-model"])
def test_missing_bucket_or_prefix(scene: Scene, uri: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        load(uri, settings=scene.settings, storage_options=storage_options(scene.proxy.url))
    check_message(caught.value, uri)


def test_wrong_secret(scene: Scene) -> None:
    options = storage_options(scene.proxy.url) | {"secret": "wrong-but-still-secret"}
    with pytest.raises(AccessDeniedError) as caught:
        scene.load(storage_options=options)
    check_message(caught.value, scene.uri)
    assert "wrong-but-still-secret" not in str(caught.value)


def test_no_credentials_anywhere(scene: Scene) -> None:
    options = {
        "endpoint_url": scene.proxy.url,
        "client_kwargs": {"region_name": "us-east-1"},
    }
    with pytest.raises(AccessDeniedError) as caught:
        scene.load(storage_options=options)
    check_message(caught.value, scene.uri)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (f.FORBIDDEN, AccessDeniedError),
        (f.NOT_FOUND, NotFoundError),
        (f.EXPIRED_TOKEN, CredentialsError),
    ],
)
def test_a_range_is_refused_for_good(
    scene: Scene, fault: f.Status, error: type[WeightstreamError]
) -> None:
    scene.use(deadline_s=30.0)
    scene.proxy.add(WEIGHTS, fault)
    started = time.monotonic()
    with pytest.raises(error) as caught:
        scene.load()
    assert time.monotonic() - started < 15  # no retries until the deadline: the answer is final
    check_message(caught.value, scene.uri, "bytes ", scene.proxy.host, fault.code)


@pytest.mark.parametrize("fault", [f.INTERNAL_ERROR, f.SLOW_DOWN, f.Status(429, "TooManyRequests")])
def test_an_origin_that_stays_broken_is_given_up_at_the_deadline(
    scene: Scene, fault: f.Status
) -> None:
    scene.use(deadline_s=1.5)
    scene.proxy.add(WEIGHTS, fault)
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        scene.load()
    assert 0.5 < time.monotonic() - started < 5
    assert isinstance(caught.value, ThrottledError) == (fault.status != 500)
    check_message(caught.value, scene.uri, "bytes ", scene.proxy.host, "deadline 1.5 s")


def test_credentials_that_expire_once_are_renewed(scene: Scene) -> None:
    scene.proxy.add(f.When(key=".safetensors", ranged=True, nth=3), f.EXPIRED_TOKEN)
    assert scene.loads_right()


def test_nobody_listens(scene: Scene) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        scene.load(storage_options=storage_options(endpoint))
    assert time.monotonic() - started < 10
    check_message(caught.value, scene.uri, "refused")


def test_the_host_has_no_name(scene: Scene) -> None:
    scene.use(deadline_s=1.0)
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        scene.load(storage_options=storage_options("http://no-such-host.invalid:9000"))
    assert time.monotonic() - started < 15
    check_message(caught.value, scene.uri, "no-such-host.invalid")


def test_a_host_that_never_answers(scene: Scene) -> None:
    """A listener that accepts and says nothing: the wait is bounded, whatever asks."""
    scene.use(stall_timeout_s=0.5, deadline_s=1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            scene.load(storage_options=storage_options(endpoint))
    assert time.monotonic() - started < 10
    check_message(caught.value, scene.uri)


@pytest.mark.parametrize("fault", [f.NOT_FOUND, f.FORBIDDEN, f.EXPIRED_TOKEN])
def test_the_command_line_says_it_in_one_line(scene: Scene, fault: f.Status) -> None:
    scene.proxy.add(WEIGHTS, fault)
    outcome = run_cli("prefetch", scene.uri, env=scene.env)
    assert outcome.returncode == 3
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    *_, last = outcome.stderr.strip().splitlines()
    assert scene.uri in last
    assert fault.code in last
    assert outcome.stderr.count(fault.code) == last.count(fault.code)
    assert SECRET_KEY not in outcome.stdout + outcome.stderr
