"""The scene of every end-to-end test: a model on a real S3 server, behind a fault proxy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import SettingsFactory
from tests.kit import models
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import SECRET_KEY, S3Server, client_env, storage_options

import weightstream
from weightstream.cachefs.fetch import process_engine
from weightstream.settings import Settings

if TYPE_CHECKING:
    import torch

_prefixes = count()


@dataclass(slots=True)
class Scene:
    """A model of the test's own at `uri`, and settings with a store of the test's own."""

    s3: S3Server
    proxy: FaultProxy
    make_settings: SettingsFactory
    settings: Settings
    prefix: str
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"s3://models/{self.prefix}"

    @property
    def store(self) -> Path:
        return self.settings.store

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(len(data) for name, data in self.files.items() if name.endswith(".safetensors"))

    def put(self, files: Mapping[str, bytes]) -> None:
        """Publish these files as the model (others that are there stay)."""
        self.files |= files
        self.s3.put_files(f"models/{self.prefix}", files)

    def load(self, **arguments: Any) -> "dict[str, torch.Tensor]":
        """Load the model in this process."""
        given = {"settings": self.settings, "storage_options": storage_options(self.proxy.url)}
        return weightstream.load(self.uri, **{**given, **arguments})

    def loads_right(self, **arguments: Any) -> bool:
        """Load, and compare every bit with what safetensors reads from the same files."""
        return models.same(self.load(**arguments), models.tensors(self.files))

    def use(self, **overrides: object) -> None:
        """Change settings."""
        self.settings = self.make_settings(**overrides)

    def drain(self) -> None:
        """Wait until everything fetched so far is in the store."""
        assert process_engine(self.settings).write_back.drain(20)

    @property
    def env(self) -> dict[str, str]:
        """The environment in which another process sees the same origin, store and settings."""
        given = self.settings.model_dump(mode="json")
        named = {f"WEIGHTSTREAM_{name.upper()}": str(value) for name, value in given.items()}
        return client_env(self.proxy.url) | named


@pytest.fixture
def scene(s3: S3Server, proxy: FaultProxy, store_settings: SettingsFactory) -> Iterator[Scene]:
    """A scene with a model of 6 MiB in three shards, loaded in chunks of 1 MiB."""
    made = Scene(s3, proxy, store_settings, store_settings(), f"e2e-{next(_prefixes)}")
    made.put(models.sharded(3, 6 << 20, seed=made.prefix))
    yield made
    process_engine(made.settings).write_back.drain(20)


def check_message(error: BaseException, *words: str) -> None:
    """Check what the project promises of every error: one line, the words, no secret."""
    text = str(error)
    assert "\n" not in text
    assert SECRET_KEY not in text
    for word in words:
        assert word in text, f"{word!r} missing in {text!r}"
