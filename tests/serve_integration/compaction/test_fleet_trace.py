"""The trace of the bench: full workers at first, and a number that cannot be beaten by much."""

import pytest

from weightstream.bench.serve.fleet_trace import CPUS, WORKERS, bins, node_seconds, trace


@pytest.mark.parametrize("seed", range(1, 20))
def test_every_worker_is_full_before_the_load_drops(seed: int) -> None:
    found = trace(seed, tail_s=60)
    used = [sum(found.sizes[app] * n for app, n in one.items()) for one in found.growth]
    assert len(used) == WORKERS
    assert all(CPUS - min(found.sizes.values()) < one <= CPUS for one in used)
    least = sum(found.sizes[app] * n for app, n in found.steps[-1].targets.items())
    assert least < 0.45 * WORKERS * CPUS
    assert least / CPUS <= found.best < WORKERS


def test_best_fit_decreasing_and_what_nodes_cost() -> None:
    assert bins([], 4) == 0
    assert bins([2, 2, 1.5, 1.5, 1], 4) == 2
    assert bins([3, 3, 1, 1], 4) == 2
    assert node_seconds([], 100) == 500
    assert node_seconds([20, 30], 100) == 350
