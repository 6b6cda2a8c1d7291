"""How long the compaction planner takes: `python -m weightstream.bench.serve.planner`.

Three fleets of 1,000 nodes with 8 GPUs each: one with a node that can be emptied, one in which none
can (every node is looked at), and one with as many deployments as replicas.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

from weightstream.serve_integration.compaction.fleet import (
    Fleet,
    Model,
    Node,
    Replica,
    Workload,
)
from weightstream.serve_integration.compaction.planner import Limits, choose, explain

_NODES = 1000
_GPUS = 8
_RUNS = 7


def _workload(name: str, gpus: float) -> Workload:
    return Workload(name, ({"GPU": gpus, "CPU": 4 * gpus},), models=(Model(f"s3://{name}", 1),))


def _node(name: str, workloads: Iterable[Workload], rnd: random.Random) -> Node:
    total: dict[str, float] = {"GPU": _GPUS, "CPU": 96, "memory": 1 << 40, f"node:{name}": 1}
    replicas = tuple(Replica(f"{name}.{i}", one) for i, one in enumerate(workloads))
    free = dict(total)
    for replica in replicas:
        for kind, amount in replica.workload.bundles[0].items():
            free[kind] -= amount
    holds = {model.uri: 1 for one in replicas for model in one.workload.models}
    return Node(name, total, free, replicas, {"zone": rnd.choice("abc")}, holds)


def _loose(rnd: random.Random) -> Fleet:
    shapes = [_workload(f"m{i}", rnd.choice([0.5, 1, 2])) for i in range(20)]
    picks = (rnd.choices(shapes, k=rnd.randint(1, 3)) for _ in range(_NODES))
    return Fleet(tuple(_node(f"n{i}", pick, rnd) for i, pick in enumerate(picks)))


def _full(rnd: random.Random) -> Fleet:
    """Give each node half a GPU's room, and replicas of which the last needs a whole one."""
    half, one = _workload("half", 0.5), _workload("one", 1)
    pick = [half] * 7 + [one] * 4
    return Fleet(tuple(_node(f"n{i}", pick, rnd) for i in range(_NODES)))


def _varied(rnd: random.Random) -> Fleet:
    def pick(i: int) -> list[Workload]:
        return [_workload(f"m{i}.{j}", rnd.choice([0.5, 1, 2])) for j in range(rnd.randint(1, 3))]

    return Fleet(tuple(_node(f"n{i}", pick(i), rnd) for i in range(_NODES)))


def _milliseconds(work: Callable[[], object]) -> list[float]:
    taken: list[float] = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def main() -> None:
    """Print the median and the longest of a few runs for each fleet."""
    rnd = random.Random(1)
    for name, fleet in (("loose", _loose(rnd)), ("full", _full(rnd)), ("varied", _varied(rnd))):
        for verb, work in (("choose", choose), ("explain", explain)):
            taken = _milliseconds(partial(work, fleet, Limits()))
            median, longest = statistics.median(taken), max(taken)
            print(f"{name:7} {verb:8} median {median:7.1f} ms   longest {longest:7.1f} ms")


if __name__ == "__main__":
    main()
