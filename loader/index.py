"""`model.safetensors.index.json`: which file of a sharded model holds which tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.errors import FormatError
from weightstream.loader.header import MAX_HEADER_BYTES, decode_object, shown

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Index:
    """`weight_map` of one index: tensor name to file name, beside the index."""

    blob: Blob
    weight_map: Mapping[str, str]

    def file_of(self, blob: Blob) -> str:
        """Return the name by which the index knows `blob`."""
        return blob.uri.removeprefix(self.blob.uri.rsplit("/", 1)[0] + "/")


def check_index_size(blob: Blob) -> None:
    """Refuse an index that is too large to be one, before it is fetched."""
    if blob.size > MAX_HEADER_BYTES:
        raise FormatError(
            f"{blob.uri}: {blob.size} bytes exceed the limit of {MAX_HEADER_BYTES} for an index"
        )


def parse_index(blob: Blob, body: bytes) -> Index:
    """Return the index; FormatError when it is not one."""
    try:
        found = decode_object(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{blob.uri}: index is not valid JSON: {error}") from error
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{blob.uri}: index has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise FormatError(f"{blob.uri}: weight_map of {shown(name)} is not a file name")
    return Index(blob, weight_map)
