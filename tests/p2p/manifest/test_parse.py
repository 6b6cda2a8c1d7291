"""What is written can be read again, and nothing else can be read at all."""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.p2p.manifest.attacks import BODIES, CHANGES, MIB, changed, good

from weightstream.cachefs.blob import Blob
from weightstream.errors import FormatError, IntegrityError
from weightstream.p2p.manifest import Manifest, ManifestFile
from weightstream.p2p.manifest.parse import encode, parse, path_fault

URI = "s3://models/m"


def manifest() -> Manifest:
    """Return what `good` describes."""
    files = (
        ManifestFile("a.bin", 5, "v1", bytes(32)),
        ManifestFile("b/c.bin", MIB + 1, "v2", bytes(64), 255),
    )
    return Manifest(MIB, files, None, URI)


def test_good_document_is_read() -> None:
    body = changed(lambda document: document.update(root=manifest().root.hex()))
    assert parse(body, URI) == manifest()


@pytest.mark.parametrize("name", CHANGES)
def test_attack_is_refused_by_name(name: str) -> None:
    change, says = CHANGES[name]
    with pytest.raises((FormatError, IntegrityError)) as refused:
        parse(changed(change), URI, f"{URI}/.weightstream/manifest.json")
    message = str(refused.value)
    assert says in message
    assert message.startswith(f"{URI}/.weightstream/manifest.json: ")
    assert "\n" not in message
    assert len(message) < 500
    assert message.isprintable()


@pytest.mark.parametrize("name", BODIES)
def test_body_that_is_no_manifest(name: str) -> None:
    with pytest.raises(FormatError, match="not a manifest") as refused:
        parse(BODIES[name], URI)
    assert len(str(refused.value)) < 500


def test_every_byte_counts() -> None:
    """The root hash covers all that is believed: whichever field is changed, it is seen."""
    one, two = manifest().files
    seen = {manifest().root}
    for files in (
        (one,),
        (two,),
        (replace(one, path="a.bim"), two),
        (replace(one, size=6), two),
        (replace(one, version="v3"), two),
        (replace(one, crc64nvme=0), two),
        (one, replace(two, crc64nvme=254)),
        (one, replace(two, crc64nvme=None)),
        (one, replace(two, digests=bytes(63) + b"\1")),
        (replace(one, path="a.binv", version="1"), two),
    ):
        seen.add(Manifest(MIB, files).root)
    seen.add(Manifest(2 * MIB, manifest().files).root)
    assert len(seen) == 12
    assert replace(manifest(), signature=bytes(64)).root == manifest().root


paths = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1),
    min_size=1,
    max_size=4,
).map("/".join)
versions = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    chunk_size = draw(st.sampled_from([64 << 10, MIB, 8 * MIB]))
    files = []
    names = draw(st.sets(paths.filter(lambda p: path_fault(p) is None), max_size=5))
    for path in sorted(names):
        if any(other.startswith(f"{path}/") for other in names):
            continue  # a file cannot be a folder
        size = draw(st.integers(0, 5 * chunk_size))
        count = -(-size // chunk_size)
        digests = draw(st.binary(min_size=32 * count, max_size=32 * count))
        crc = draw(st.none() | st.integers(0, 2**64 - 1))
        files.append(ManifestFile(path, size, draw(versions), digests, crc))
    signature = draw(st.none() | st.binary(min_size=64, max_size=64))
    return Manifest(chunk_size, tuple(files), signature, URI)


@settings(deadline=None)
@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    body = encode(manifest)
    again = parse(body, URI)
    assert again == manifest
    assert again.root == manifest.root
    assert encode(again) == body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    st.sampled_from(["format", "chunk_size", "root", "signature", "files", "new"]) | st.none(),
    st.sampled_from(["path", "size", "version", "crc64nvme", "blake3", "new"]),
    json_values,
)
@example("files", "path", [])
def test_any_value_in_any_place(top: str | None, key: str, value: object) -> None:
    """A document with an arbitrary value is refused in our words, or is read and means itself."""
    document = good()
    (document if top is not None else document["files"][0])[top or key] = value
    body = json.dumps(document).encode()
    with pytest.raises((FormatError, IntegrityError)):
        parse(body, URI)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(body: bytes) -> None:
    with pytest.raises(FormatError):
        parse(body, URI)


@settings(deadline=None)
@given(st.data())
def test_any_change_of_a_byte(data: st.DataObject) -> None:
    """Whatever a bit does to the file, what is read is what was published, or nothing is."""
    body = bytearray(encode(manifest()))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = parse(bytes(body), URI)
    except (FormatError, IntegrityError):
        return
    assert found == manifest()


def test_nothing_is_written_that_could_not_be_read() -> None:
    one, two = manifest().files
    for files, says in (
        ((replace(one, path="../a"), two), "leads out"),
        ((two, one), "out of order"),
        ((one, replace(two, digests=b"")), "need 64"),
    ):
        with pytest.raises(FormatError, match=says):
            encode(Manifest(MIB, files, None, URI))


@pytest.mark.parametrize(
    ("model", "uri", "path"),
    [
        ("s3://models/m", "s3://models/m/a.bin", "a.bin"),
        ("s3://models/m/", "s3://models/m/b/c.bin", "b/c.bin"),
        ("s3a://models/m", "s3://models/m/a.bin", "a.bin"),
        ("memory://m", "memory:///m/a.bin", "a.bin"),
        ("https://h/x/m", "https://h/x/m/a%20b.bin", "a b.bin"),
        ("s3://models/m", "s3://models/m/a%20b.bin", "a%20b.bin"),
        ("/data/m", "file:///data/m/a.bin", "a.bin"),
        ("s3://models/m", "s3://models/m2/a.bin", None),
        ("s3://models/m", "s3://models/m", None),
    ],
)
def test_path_of_a_file(model: str, uri: str, path: str | None) -> None:
    from weightstream.p2p.manifest.paths import file_path

    assert file_path(model, uri) == path


def test_digest_only_of_exactly_this_blob() -> None:
    digests = bytes(range(64))
    found = Manifest(MIB, (ManifestFile("c.bin", MIB + 1, "v2", digests),), None, URI)
    blob = Blob(f"{URI}/c.bin", MIB + 1, "v2")
    assert [found.digest(blob, i) for i in (-1, 0, 1, 2)] == [
        None,
        digests[:32],
        digests[32:],
        None,
    ]
    for other in (
        replace(blob, version="v1"),
        replace(blob, version=""),
        replace(blob, size=MIB),
        replace(blob, uri=f"{URI}/d.bin"),
        replace(blob, uri="s3://models/n/c.bin"),
    ):
        assert found.digest(other, 0) is None
