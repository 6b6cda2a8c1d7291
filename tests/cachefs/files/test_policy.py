"""When a fill begins, in which order it goes, and what comes behind it."""

from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.files.policy import fill_order, load_has_begun, shards_behind

GIB = 1 << 30
SHARDS = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]


def test_a_look_at_a_header_is_no_load() -> None:
    assert not load_has_begun(4 * GIB, touched_chunks=2, deepest_chunk=1)


def test_reading_on_is_a_load() -> None:
    assert load_has_begun(4 * GIB, touched_chunks=3, deepest_chunk=2)


def test_reading_deep_inside_is_a_load() -> None:
    assert load_has_begun(4 * GIB, touched_chunks=1, deepest_chunk=300)


def test_a_small_file_is_fetched_whole_at_once() -> None:
    assert load_has_begun(1 << 20, touched_chunks=1, deepest_chunk=0)
    assert not load_has_begun(1 << 20, touched_chunks=0, deepest_chunk=0)


def test_a_fill_goes_from_the_first_read_to_the_end_and_around() -> None:
    assert fill_order(5, 3) == [3, 4, 0, 1, 2]


def test_a_fill_follows_the_recorded_order() -> None:
    assert fill_order(6, 4, recorded=[4, 0, 5]) == [4, 0, 5, 1, 2, 3]
    assert fill_order(6, 0, recorded=[4, 0, 5]) == [0, 5, 1, 2, 3, 4]


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.lists(st.integers(-3, 50)))
    )
)
def test_a_fill_visits_every_chunk_once_and_the_first_first(
    case: tuple[int, int, list[int]],
) -> None:
    n_chunks, first, recorded = case
    order = fill_order(n_chunks, first, recorded)
    assert sorted(order) == list(range(n_chunks))
    assert order[0] == first


def test_behind_a_shard_come_the_later_ones_then_the_earlier() -> None:
    names = [*SHARDS, "model.safetensors.index.json", "other-00001-of-00004.safetensors"]
    assert shards_behind(SHARDS[1], names) == [SHARDS[2], SHARDS[3], SHARDS[0]]


def test_the_recorded_order_of_shards_is_followed() -> None:
    recorded = [SHARDS[3], SHARDS[1], SHARDS[0]]
    assert shards_behind(SHARDS[3], SHARDS, recorded) == [SHARDS[1], SHARDS[0], SHARDS[2]]


def test_nothing_is_behind_a_file_that_is_no_shard() -> None:
    assert shards_behind("tokenizer.json", ["tokenizer.json", *SHARDS]) == []


def test_shards_of_another_count_are_another_checkpoint() -> None:
    assert shards_behind(SHARDS[0], [SHARDS[0], "model-00002-of-00005.safetensors"]) == []
