"""`open`: safetensors' `safe_open` surface over a model wherever it lies.

Opening reads headers. A tensor is a view where its file is on this machine; else its chunks are
fetched when it is asked for, whole, so that they can be kept, and nothing else is.
"""

import mmap
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Priority
from weightstream.errors import ObjectChangedError, UsageError
from weightstream.loader.fetching import Manner, StagedFetch
from weightstream.loader.gather import find_weights
from weightstream.loader.header import TensorInfo, shown
from weightstream.loader.headers import fetch_headers, mapped_header
from weightstream.loader.plan import Place, Shard, make_plan
from weightstream.loader.report import Stopwatch
from weightstream.loader.resolve import Resolved, resolve
from weightstream.loader.session import Session
from weightstream.loader.views import tensor_over, torch_shape, torch_type

if TYPE_CHECKING:
    import torch


class OpenedModel:
    """Thread-safe. Tensors it gave out stay valid after it is closed."""

    def __init__(
        self,
        session: Session,
        device: "torch.device",
        places: Mapping[str, Place],
        memories: Mapping[Blob, mmap.mmap],
        metadata: Mapping[str, str] | None,
    ) -> None:
        self._session = session
        self._device = device
        self._places = places
        self._memories = memories
        self._metadata = metadata
        self._closed = False

    def keys(self) -> list[str]:
        """Return the tensors' names, sorted."""
        self._check_open()
        return sorted(self._places)

    def offset_keys(self) -> list[str]:
        """Return the tensors' names by file and offset."""
        self._check_open()
        return list(self._places)

    def metadata(self) -> dict[str, str] | None:
        """Return the files' metadata; of several files, the first one's word counts."""
        self._check_open()
        return None if self._metadata is None else dict(self._metadata)

    def get_tensor(self, name: str) -> "torch.Tensor":
        """Return one tensor."""
        return self.bring([self.place(name)])[name]

    def get_tensors(self) -> "dict[str, torch.Tensor]":
        """Return every tensor, by file and offset."""
        self._check_open()
        return self.bring(list(self._places.values()))

    def get_slice(self, name: str) -> "TensorSlice":
        """Return what can be indexed for a part of a tensor."""
        return TensorSlice(self, self.place(name))

    def place(self, name: str) -> Place:
        """Return where a tensor lies."""
        self._check_open()
        place = self._places.get(name)
        if place is None:
            raise UsageError(f"{self._session.uri}: the model has no tensor {shown(name)}")
        return place

    def bring(self, places: list[Place]) -> "dict[str, torch.Tensor]":
        """Return these tensors, or parts of tensors, by name."""
        missing = [p for p in places if p.blob not in self._memories or self._to_cuda]
        fetched = dict(self._fetch(missing)) if missing else {}
        found = {}
        for place in places:
            tensor = fetched.get(place.name)
            if tensor is None:
                memory, start = self._memories[place.blob], place.info.extent.start
                tensor = tensor_over(memory, start, place.blob, place.info)
            found[place.name] = tensor if self._to_cuda else tensor.to(self._device)
        return found

    @property
    def _to_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _fetch(self, places: list[Place]) -> "list[tuple[str, torch.Tensor]]":
        settings, store = self._session.settings, self._session.store
        for place in places:
            torch_type(place.blob, place.info)
            torch_shape(place.blob, place.info)
        keeps = settings.write_back == "on" and store is not None and store.writable
        manner = Manner(self._device, bounded=False, whole_chunks=keeps, priority=Priority.DEMAND)
        fetch = StagedFetch(self._session, places, manner, Stopwatch(self._session.uri))
        try:
            return [(place.name, tensor) for place, tensor in fetch]
        finally:
            fetch.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"{self._session.uri}: it was closed")

    def close(self) -> None:
        """End what is being fetched. Idempotent."""
        self._closed = True
        self._session.cancel()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class TensorSlice:
    """A tensor before its bytes are read. Leading rows are read alone; the rest is torch's."""

    def __init__(self, model: OpenedModel, place: Place) -> None:
        self._model = model
        self._place = place

    def get_shape(self) -> list[int]:
        """Return the shape that the header states."""
        return list(self._place.info.shape)

    def get_dtype(self) -> str:
        """Return the dtype as the format names it."""
        return self._place.info.dtype.name

    def __getitem__(self, index: Any) -> "torch.Tensor":
        rows, rest = leading_rows(self._place.info, index)
        if rows is None:
            return self._model.get_tensor(self._place.name)[index]
        part = row_range(self._place, rows)
        return self._model.bring([part])[part.name][rest]


def leading_rows(info: TensorInfo, index: Any) -> tuple[range | None, Any]:
    """Return the rows that `index` needs, and what to apply to them; None when it is not so simple.

    An int or a slice with step 1 in front (as tensor parallelism asks for) names whole rows, which
    lie together.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if not info.shape or not parts or info.dtype.per_element > 1 or info.dtype.bits < 8:
        return None, index
    first, count = parts[0], info.shape[0]
    if isinstance(first, slice) and first.step in (None, 1):
        start, stop, _ = first.indices(count)
        return range(start, max(start, stop)), (slice(None), *parts[1:])
    if isinstance(first, int) and not isinstance(first, bool) and -count <= first < count:
        return range(first % count, first % count + 1), (0, *parts[1:])
    return None, index


def row_range(place: Place, rows: range) -> Place:
    """Return the place of some rows of a tensor, as if they were one of their own."""
    info = place.info
    row_bytes = len(info.extent) // info.shape[0] if info.shape[0] else 0
    start = info.extent.start + rows.start * row_bytes
    extent = Extent(start, start + len(rows) * row_bytes)
    shape = (len(rows), *info.shape[1:])
    return Place(place.blob, TensorInfo(info.name, info.dtype, shape, extent))


def open_model(session: Session, device: "torch.device") -> OpenedModel:
    """Read the headers of a model; of its new version when an object was replaced just now."""
    try:
        resolved = resolve(session)
        try:
            return _open_once(session, resolved, device)
        except ObjectChangedError:
            return _open_once(session, resolve(session, ask_origin=True), device)
    except BaseException:
        session.close()
        raise


def _open_once(session: Session, resolved: Resolved, device: "torch.device") -> OpenedModel:
    weights = find_weights(session, resolved, None)
    fetched = fetch_headers(session, weights.missing) if weights.missing else {}
    shards = [
        Shard(
            blob,
            fetched[blob].header
            if blob in fetched
            else mapped_header(blob, weights.memories[blob]),
        )
        for blob in weights.blobs
    ]
    places = {place.name: place for place in make_plan(shards, weights.index, None).places}
    stated = [dict(s.header.metadata) for s in shards if s.header.metadata is not None]
    merged: dict[str, str] | None = None
    for one in stated:
        merged = {**one, **(merged or {})}
    return OpenedModel(session, device, places, weights.memories, merged)
