"""Which version a path of a libfuse mount stands for, whatever happens to the object meanwhile."""

import errno

import pytest

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import File, Folder
from weightstream.cachefs.fuse.versions import Shown, Versions

PATH, HIDDEN = "m/a", "m/.fuse_hidden0000000100000001"
OLD, NEW = (File(PATH, Blob("s3://b/m/a", 10, version), 0) for version in ("v1", "v2"))
LATER = File(PATH, OLD.blob, 5)


def opened(versions: Versions, file: File = OLD) -> Shown:
    assert versions.show(PATH, file) == file
    return versions.open(PATH, file)[0]


def test_what_nobody_has_open_is_what_the_tree_says() -> None:
    versions = Versions()
    assert [versions.show(PATH, now) for now in (OLD, NEW, None, OLD)] == [OLD, NEW, None, OLD]
    assert versions.show("m", Folder("m")) == Folder("m")


def test_open_must_be_of_what_the_kernel_was_told() -> None:
    versions = Versions()
    versions.show(PATH, OLD)
    with pytest.raises(OSError) as caught:  # noqa: PT011 (its errno is looked at)
        versions.open(PATH, NEW)
    assert caught.value.errno == errno.ESTALE
    versions.show(PATH, NEW)
    assert versions.open(PATH, NEW)[0].file == NEW


@pytest.mark.parametrize("now", [None, NEW, Folder(PATH)])
def test_open_of_what_was_never_looked_up_is_stale(now: object) -> None:
    with pytest.raises(OSError, match=r"[Ss]tale"):
        Versions().open(PATH, now)  # type: ignore[arg-type]


def test_pages_are_kept_between_opens_of_one_version_only() -> None:
    versions = Versions()
    shown = opened(versions)
    versions.close(shown)
    shown, keeps = versions.open(PATH, OLD)
    assert keeps is True
    versions.close(shown)
    versions.show(PATH, NEW)
    assert versions.open(PATH, NEW)[1] is False


@pytest.mark.parametrize("now", [NEW, None, Folder(PATH)])
def test_open_file_stays_what_it_is_until_its_name_is_unlinked(now: File | Folder | None) -> None:
    versions = Versions()
    opened(versions)
    assert not versions.is_overtaken(PATH, OLD)
    assert versions.is_overtaken(PATH, now)
    assert versions.show(PATH, now) == OLD
    assert versions.open(PATH, now)[0].file == OLD
    versions.put_aside(PATH, HIDDEN)
    assert versions.show(PATH, now) == now
    assert not versions.is_overtaken(PATH, now)
    assert versions.hidden(HIDDEN) == OLD
    assert versions.show(HIDDEN, None) == OLD


def test_another_time_of_the_same_version_is_shown_at_once() -> None:
    versions = Versions()
    opened(versions)
    assert versions.show(PATH, LATER) == LATER
    assert not versions.is_overtaken(PATH, LATER)


def test_new_version_has_no_pages_of_the_one_put_aside() -> None:
    versions = Versions()
    old = opened(versions)
    versions.put_aside(PATH, HIDDEN)
    new = opened(versions, NEW)
    assert (old.file, new.file, versions.opens()) == (OLD, NEW, 2)
    versions.close(old)
    versions.drop(HIDDEN)
    assert versions.hidden(HIDDEN) is None
    assert versions.show(PATH, NEW) == NEW
    assert versions.opens() == 1


def test_hidden_file_can_be_opened_once_more() -> None:
    """OPEN may be under way while the name is unlinked: libfuse asks by the hidden path then."""
    versions = Versions()
    opened(versions)
    versions.put_aside(PATH, HIDDEN)
    shown, keeps = versions.open(HIDDEN, None)
    assert (shown.file, shown.opens, keeps) == (OLD, 2, True)


def test_dropped_path_is_forgotten() -> None:
    versions = Versions()
    versions.close(opened(versions))
    versions.drop(PATH)
    with pytest.raises(OSError, match=r"[Ss]tale"):
        versions.open(PATH, OLD)
