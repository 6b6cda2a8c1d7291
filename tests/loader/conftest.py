"""Fixtures of the loader's tests: models behind a counting proxy, and how to reach them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import SettingsFactory
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.fetch import process_engine
from weightstream.settings import Settings

_numbers = count()


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the S3 server of the session."""

    uri: str
    key: str
    files: Mapping[str, bytes]
    options: Mapping[str, object]
    settings: Settings

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what safetensors reads from the same files (bytes alone lack some dtypes)."""
        found: dict[str, torch.Tensor] = {}
        with TemporaryDirectory() as folder:
            for name, data in self.files.items():
                if name.endswith(".safetensors"):
                    path = Path(folder, name)
                    path.write_bytes(data)
                    found |= {n: t.clone() for n, t in load_file(path).items()}
        return found

    @property
    def weight_bytes(self) -> int:
        """Return the size of its safetensors files."""
        return sum(len(d) for name, d in self.files.items() if name.endswith(".safetensors"))

    def wait_for_store(self, settings: Settings | None = None) -> None:
        """Return when the write-back of this process has ended."""
        assert process_engine(settings or self.settings).write_back.drain(20)


ModelFactory = Callable[..., Model]


@pytest.fixture
def put(s3: S3Server, proxy: FaultProxy, store_settings: SettingsFactory) -> ModelFactory:
    """Put a model on the server, under a name of its own."""

    def make(files: Mapping[str, bytes], **overrides: object) -> Model:
        key = f"models/loader-{next(_numbers)}"
        s3.put_files(key, files)
        settings = store_settings(**overrides)
        return Model(f"s3://{key}", key, files, storage_options(proxy.url), settings)

    return make


@pytest.fixture(autouse=True)
def _drained() -> Iterator[None]:
    """Let no write-back of one test run into the next."""
    yield
    from weightstream.cachefs.fetch import engine

    for one in tuple(engine._engines.values()):
        one.write_back.drain(20)
