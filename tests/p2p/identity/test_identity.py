"""The node's name, the secret's file, and what is refused about them."""

import builtins
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SettingsFactory
from tests.p2p.identity.conftest import OTHER_SECRET, IdentityFactory, SecretFactory

from weightstream.cachefs.store import Store
from weightstream.cachefs.store.layout import open_layout
from weightstream.errors import ForeignStoreError, UsageError
from weightstream.p2p.identity import is_node_name, name, open_identity


def test_a_name_outlives_the_process(identity: IdentityFactory, tmp_path: Path) -> None:
    first, again, other = identity("a"), identity("a"), identity("b")
    assert first.node == again.node == (tmp_path / "a" / "node").read_text().strip()
    assert other.node != first.node
    assert is_node_name(first.node)
    assert first.instance != again.instance
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["format.json", "node"]


def test_processes_that_start_at_once_agree_on_the_name(store_settings: SettingsFactory) -> None:
    settings = store_settings(peer_encryption="off")
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda: names.append(open_identity(settings).node))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 8
    assert len(set(names)) == 1


def test_a_store_takes_the_file_for_its_own(store_settings: SettingsFactory) -> None:
    settings = store_settings(peer_encryption="off")
    node = open_identity(settings).node
    with Store.open(settings) as store:
        assert store.writable
    assert open_identity(settings).node == node


def test_a_store_that_cannot_be_written_gives_a_name_for_the_process(
    store_settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = store_settings(peer_encryption="off")
    # root may write everywhere, so what a read-only file system says is said for it
    monkeypatch.setattr(name, "open_layout", lambda root: (open_layout(root)[0], False))
    assert is_node_name(open_identity(settings).node)
    assert not (settings.store / "node").exists()
    monkeypatch.undo()
    kept = open_identity(settings).node
    monkeypatch.setattr(name, "open_layout", lambda root: (open_layout(root)[0], False))
    assert open_identity(settings).node == kept


def test_no_name_is_left_in_a_directory_of_somebody_else(
    store_settings: SettingsFactory, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").touch()
    with pytest.raises(ForeignStoreError):
        open_identity(store_settings(peer_encryption="off"))
    assert not (tmp_path / "store" / "node").exists()


@pytest.mark.parametrize("content", [b"", b"two words\n", b"\xff\xfe", b"x" * 9000, b"../a\n"])
def test_a_spoilt_name_is_refused(
    content: bytes, identity: IdentityFactory, tmp_path: Path
) -> None:
    identity("a")
    (tmp_path / "a" / "node").write_bytes(content)
    with pytest.raises(UsageError, match="node holds no node's name"):
        identity("a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("secret", "mode", "cause"),
    [
        (b"", 0o600, "is empty"),
        (b" \n\n", 0o600, "is empty"),
        (b"fifteen bytes..", 0o600, "holds 15 bytes, fewer than 16"),
        (b"s" * 32, 0o604, "open to every user .mode 604."),
        (b"s" * 32, 0o602, "open to every user"),
        (b"s" * 70_000, 0o600, "more than 65536"),
    ],
)
def test_a_bad_secret_is_refused(
    secret: bytes,
    mode: int,
    cause: str,
    store_settings: SettingsFactory,
    secret_file: SecretFactory,
) -> None:
    path = secret_file(secret, mode)
    with pytest.raises(UsageError, match=cause) as refused:
        open_identity(store_settings(cluster_secret_file=path))
    assert path in str(refused.value)
    assert "ssssssss" not in str(refused.value)


def test_a_missing_secret_is_refused(store_settings: SettingsFactory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: No such file"):
        open_identity(store_settings(cluster_secret_file=str(tmp_path / "nowhere")))


def test_encryption_without_a_secret_is_refused(store_settings: SettingsFactory) -> None:
    with pytest.raises(UsageError, match=r"set cluster_secret_file .* or peer_encryption off"):
        open_identity(store_settings())


def test_encryption_without_its_package_is_refused(
    identity: IdentityFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'weightstream\[p2p\]'"):
        identity("a")
    assert identity("a", peer_encryption="off").sign("GET", "/")


def test_members_derive_the_same_keys(identity: IdentityFactory) -> None:
    one, two, other = identity("a"), identity("b"), identity("c", OTHER_SECRET)
    assert one.key("swarm") == two.key("swarm")
    assert one.key("swarm") != one.key("tracker")
    assert one.key("swarm") != other.key("swarm")
    open_one, open_two = (identity(n, None, peer_encryption="off") for n in "de")
    assert open_one.key("swarm") == open_two.key("swarm")
    assert len(one.key("swarm")) == len(open_one.key("swarm")) == 32


def test_nothing_secret_is_shown(identity: IdentityFactory) -> None:
    one = identity("a")
    shown = repr(one) + repr(one.credentials("*"))
    assert one.key("x").hex() not in shown
    assert "PRIVATE" not in shown
    assert "signer" not in shown


def test_an_impossible_zone_is_refused(identity: IdentityFactory) -> None:
    with pytest.raises(UsageError, match="bad zone"):
        identity("a", zone="z" * 129)
    assert identity("a", zone="eu-west-1a").zone == "eu-west-1a"
