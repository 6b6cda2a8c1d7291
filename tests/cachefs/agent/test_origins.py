"""Which origins an agent reads, and for whom."""

import pytest
from tests.conftest import SettingsFactory
from tests.kit.proxy import FaultProxy

from weightstream.cachefs.agent.origins import Origins
from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.job import Attempt
from weightstream.errors import UsageError, WeightstreamError
from weightstream.loader.session import Session


def blob(uri: str) -> Blob:
    return Blob(uri, 7, "v1")


@pytest.fixture
def origins(store_settings: SettingsFactory) -> Origins:
    return Origins(store_settings(), ["s3://models/public/"])


def test_a_blob_is_read_from_the_root_above_it(origins: Origins) -> None:
    found = origins.source_for(blob("s3://models/public/a/b"))
    assert found is not None
    assert found.uri == "s3://models/public"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://models/private/a",
        "s3://models/publication/a",
        "s3://models",
        "gs://models/public/a",
        "file:///etc/passwd",
        "s3://others/public/a",
    ],
)
def test_nothing_else_is(origins: Origins, uri: str) -> None:
    assert origins.source_for(blob(uri)) is None


def test_what_a_client_here_reads_is_read_for_peers_too(origins: Origins) -> None:
    origins.admit("s3a://models/private/")
    origins.admit("s3a://models/private/")
    found = origins.source_for(blob("s3://models/private/a"))
    assert found is not None
    assert origins.roots() == ("s3://models/public", "s3://models/private")


def test_the_longest_root_counts(origins: Origins) -> None:
    origins.admit("s3://models/public/a")
    origins.admit("s3://models")
    found = origins.source_for(blob("s3://models/public/a/b"))
    assert found is not None
    assert found.uri == "s3://models/public"


def test_what_lies_under_an_open_root_is_read_through_it(
    proxy: FaultProxy, s3_env: dict[str, str], store_settings: SettingsFactory
) -> None:
    """Each origin has a client, credentials and connections of its own."""
    origins = Origins(store_settings(), ["s3://models"])
    origins.prepare()
    origins.admit("s3a://models/one/")
    origins.admit("s3://models/one")
    found = origins.source_for(blob("s3://models/one/file"))
    assert found is not None
    assert found.host == f"{proxy.host}:{proxy.port}"
    assert origins.roots() == ("s3://models",)
    origins.close()


def test_a_part_of_the_web_may_have_a_password_of_its_own(store_settings: SettingsFactory) -> None:
    origins = Origins(store_settings(), ["https://host/models"])
    origins.admit("https://user:secret@host/models/private")
    assert origins.roots() == ("https://host/models", "https://host/models/private")
    found = origins.source_for(blob("https://host/models/private/a"))
    assert found is not None
    assert found.uri == "https://host/models/private"
    origins.close()


def test_a_root_that_others_are_read_through_is_not_the_first_to_be_forgotten(
    origins: Origins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.cachefs.agent.origins._MOST_ASKED", 2)
    for root in ("s3://a", "s3://b", "s3://a/m", "s3://c"):
        origins.admit(root)
    assert origins.roots() == ("s3://models/public", "s3://a", "s3://c")
    assert origins.source_for(blob("s3://a/m/file")) is not None
    origins.close()


@pytest.mark.parametrize("root", ["file:///etc", "/etc", "etc"])
def test_files_of_this_machine_are_none_of_its_business(origins: Origins, root: str) -> None:
    with pytest.raises(UsageError, match="on this machine"):
        origins.admit(root)


def test_roots_that_clients_asked_for_are_forgotten_one_day(
    origins: Origins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.cachefs.agent.origins._MOST_ASKED", 2)
    for name in "abc":
        origins.admit(f"s3://{name}/m")
    assert origins.roots() == ("s3://models/public", "s3://b/m", "s3://c/m")
    origins.admit("s3://a/m")
    assert origins.source_for(blob("s3://a/m/file")) is not None
    assert origins.source_for(blob("s3://models/public/file")) is not None
    origins.close()


@pytest.mark.parametrize(
    ("uri", "shared"),
    [
        ("s3://models/m/", True),
        ("https://host/m", True),
        ("https://host/m/", True),
        ("https://host/m?X-Amz-Signature=secret", False),
        ("https://user:secret@host/m", False),
        ("/models/m", False),
    ],
)
def test_what_only_the_caller_can_read_is_not_asked_of_an_agent(
    store_settings: SettingsFactory, uri: str, shared: bool
) -> None:
    with Session(uri, store_settings(), None) as session:
        assert session._may_share is shared


def test_configured_origins_are_ready_before_the_first_load(
    proxy: FaultProxy, s3_env: dict[str, str], store_settings: SettingsFactory
) -> None:
    origins = Origins(store_settings(), ["s3://models", "https://host/m"])
    found = origins.source_for(blob("s3://models/m/file"))
    assert found is not None
    assert found.host == "s3"
    origins.prepare()
    assert found.host == f"{proxy.host}:{proxy.port}"
    assert proxy.connections == 0
    origins.close()


def test_an_origin_that_cannot_be_made_ready_is_left_to_its_load(
    s3_env: dict[str, str], store_settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    origins = Origins(store_settings(), ["s3://models", "s3://others"])
    origins.prepare()
    found = origins.source_for(blob("s3://models/m/file"))
    assert found is not None
    with pytest.raises(WeightstreamError, match="nobody"):
        found.read_into(blob("s3://models/m/file"), 0, memoryview(bytearray(7)), Attempt(print))
    origins.close()
