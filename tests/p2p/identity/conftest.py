"""Identities of nodes that have a store, and a secret, of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory

from weightstream.p2p.identity import Identity, open_identity

SECRET = b"a secret for a cluster of tests\n"
OTHER_SECRET = b"another secret, of another cluster\n"

IdentityFactory = Callable[..., Identity]
SecretFactory = Callable[..., str]


@pytest.fixture
def secret_file(tmp_path: Path) -> SecretFactory:
    """Write a secret's file; return its path."""

    def make(secret: bytes = SECRET, mode: int = 0o600) -> str:
        path = tmp_path / f"secret-{len(list(tmp_path.glob('secret-*')))}"
        path.write_bytes(secret)
        path.chmod(mode)
        return str(path)

    return make


@pytest.fixture
def identity(
    tmp_path: Path, store_settings: SettingsFactory, secret_file: SecretFactory
) -> IdentityFactory:
    """Open the identity of a node of this name's store."""

    def make(node: str = "a", secret: bytes | None = SECRET, **overrides: object) -> Identity:
        named = {"cluster_secret_file": secret_file(secret)} if secret is not None else {}
        return open_identity(store_settings(store=tmp_path / node, **(named | overrides)))

    return make
