"""Scenarios of a cluster on shaped links; see `SCENARIOS` for what they are.

`python -m weightstream.bench.cluster.run [--only NAME ...] [--repeat N]`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from weightstream.bench.certificates import Certificates, make_certificates
from weightstream.bench.cluster.model import write_model
from weightstream.bench.cluster.net import ORIGIN, Network, Plan, network
from weightstream.bench.cluster.node import Job, Result
from weightstream.bench.errors import BenchError
from weightstream.bench.servers import Server, nginx

MIB = 1 << 20
_READY_S = 60.0
_LOAD_S = 180.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One cell: a network, what its nodes do, and what is asked of it."""

    name: str
    plan: Plan
    size_bytes: int = 256 * MIB
    peered: bool = True
    loader: Literal["weightstream", "runai"] = "weightstream"
    settings: dict[str, Any] = field(default_factory=dict)
    stagger_s: float = 0.0
    warm: int = 0
    """So many nodes load before the clock starts."""
    killed: tuple[int, ...] = ()
    """Nodes, from 1, that are killed after a third of the bound."""
    slowed: tuple[int, ...] = ()
    """Nodes whose link turns ten times slower then."""
    lying: tuple[int, ...] = ()
    """Nodes that serve flipped bits."""
    faults: int = 0
    """So many chunks are read at random places by the last node while all load."""
    bound_mbit: float = 0.0
    """What the time is compared with, when it is not the link."""

    @property
    def bound_s(self) -> float:
        """Return the least time that one node's link allows."""
        rate = self.plan.payload_bytes_s
        if self.bound_mbit:
            rate *= self.bound_mbit / self.plan.mbit
        return self.size_bytes / rate


_SMALL = {"chunk_size": "1MiB", "range_size": "1MiB"}
SCENARIOS = (
    Scenario("crowd-2", Plan(2)),
    Scenario("crowd-4", Plan(4)),
    Scenario("crowd-8", Plan(8)),
    Scenario("capped-8", Plan(8, client_cap_mbit=50)),
    Scenario("alone-1", Plan(1)),
    Scenario("alone-4", Plan(4), peered=False),
    Scenario("runai-4", Plan(4), peered=False, loader="runai"),
    Scenario("stagger-8", Plan(8), stagger_s=1.5),
    Scenario("join-warm-5", Plan(5), warm=4),
    Scenario("home-dies-8", Plan(8), killed=(3,)),
    Scenario("quarter-dies-8", Plan(8), killed=(3, 6)),
    Scenario("slow-peer-8", Plan(8), slowed=(3,)),
    Scenario("liar-8", Plan(8), lying=(3,)),
    Scenario("fault-held-5", Plan(5), warm=4, settings=_SMALL, faults=40),
    Scenario("fault-cold-8", Plan(8), settings=_SMALL, faults=20),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of a scenario."""

    scenario: str
    seconds: tuple[float, ...]
    """By node, those that were measured."""
    bound_s: float
    egress: float
    """What the origin sent of the file's bytes, in files."""
    cpu_s: tuple[float, ...]
    sources: tuple[dict[str, float], ...]
    errors: tuple[str, ...]
    fault_s: tuple[float, ...] = ()

    @property
    def of_bound(self) -> float:
        """Return the slowest node's time over the bound."""
        return max(self.seconds) / self.bound_s


class Node:
    """A node's process."""

    def __init__(self, net: Network, end: int, job: Job, env: dict[str, str], log: Path) -> None:
        self.end = end
        command = [*net.prefix(end), sys.executable, "-m", "weightstream.bench.cluster.node"]
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            [*command, json.dumps(asdict(job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True,
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Return when it may be told to go."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise BenchError(f"node {self.end} did not start: see {self._log.name}")

    def tell(self, word: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def result(self) -> Result:
        """Wait for what it measured."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"node {self.end} died: see {self._log.name}")
        return Result(**json.loads(line))

    def close(self) -> None:
        """End it."""
        try:
            self.tell("end")
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            self.process.kill()
            self.process.wait(10)
            self._log.close()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run works: the served file and the scratch folder."""

    work: Path
    root: Path
    digest: str
    data_digest: str
    """Of its tensors' bytes alone."""
    certificates: Certificates


def run(place: Place, scenario: Scenario) -> Outcome:
    """Run a scenario once."""
    with ExitStack() as stack:
        net = stack.enter_context(network(scenario.plan))
        server = stack.enter_context(
            nginx(
                place.root, "models", place.work / "nginx", place.certificates,
                net.address(ORIGIN), net.prefix(ORIGIN),
            )
        )  # fmt: skip
        nodes = [
            Node(
                net,
                end,
                _job(scenario, net, place, end),
                environment(server),
                place.work / f"{end}.log",
            )
            for end in range(1, scenario.plan.nodes + 1)
        ]
        for node in nodes:
            stack.callback(node.close)
        for node in nodes:
            node.wait_ready()
        time.sleep(2.5)  # the members have found each other
        return _measure(place, scenario, server, net, nodes)


def _measure(
    place: Place, scenario: Scenario, server: Server, net: Network, nodes: list[Node]
) -> Outcome:
    warm, measured = nodes[: scenario.warm], nodes[scenario.warm :]
    for node in warm:
        node.tell("go")
    for node in warm:
        node.result()
    mark = server.mark()
    for node in measured:
        node.tell("go")
        time.sleep(scenario.stagger_s)
    _disturb(scenario, net, measured)
    odd = {*scenario.killed, *scenario.slowed, *scenario.lying}
    results = [node.result() for node in measured if node.end not in odd]
    digest = place.data_digest if scenario.loader == "runai" else place.digest
    wrong = [f"node {i}: wrong bytes" for i, r in enumerate(results) if r.digest != digest]
    return Outcome(
        scenario.name,
        tuple(r.seconds for r in results),
        scenario.bound_s,
        server.traffic(mark).data_bytes / scenario.size_bytes,
        tuple(r.cpu_s for r in results),
        tuple(r.sources for r in results),
        (*(r.error for r in results if r.error), *wrong),
        tuple(seconds for r in results for seconds in r.fault_s),
    )


def _disturb(scenario: Scenario, net: Network, nodes: list[Node]) -> None:
    """Kill or slow down whom the scenario names, after a third of the bound."""
    if scenario.killed or scenario.slowed:
        time.sleep(scenario.bound_s / 3)
    for node in nodes:
        if node.end in scenario.killed:
            node.process.kill()
        if node.end in scenario.slowed:
            net.set_rate(node.end, scenario.plan.mbit / 10)


def _job(scenario: Scenario, net: Network, place: Place, end: int) -> Job:
    store = place.work / f"store{end}"
    peers = [f"{net.address(n)}:7470" for n in range(1, scenario.plan.nodes + 1)]
    settings = {
        "store": str(store),
        "peer_listen": f"{net.address(end)}:7470",
        "peer_encryption": "off",
        "peers": ",".join(peers),
        "store_min_free_bytes": 0,
        "memory_budget": 1 << 30,
        **scenario.settings,
    }
    last = end == scenario.plan.nodes
    return Job(
        "s3://models/model.safetensors",
        settings,
        scenario.peered,
        loader=scenario.loader,
        faults=scenario.faults if last else 0,
        lies=end in scenario.lying,
    )


def environment(server: Server) -> dict[str, str]:
    """Return the environment in which the bucket is found."""
    return os.environ | {
        "AWS_ENDPOINT_URL": server.endpoint(tls=False),
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench-secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def place(size_bytes: int, folder: str | None = None) -> Iterator[Place]:
    """Make the file that everybody loads."""
    with tempfile.TemporaryDirectory(prefix="weightstream-cluster-", dir=folder) as name:
        work = Path(name)
        models = work / "root" / "models"
        models.mkdir(parents=True)
        digest, data_digest = write_model(models / "model.safetensors", size_bytes)
        certificates = make_certificates(work / "tls", ("127.0.0.1",))
        yield Place(work, work / "root", digest, data_digest, certificates)


def main() -> None:
    """Run scenarios, interleaved, and print what came of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--mbit", type=int, default=200, help="each link's rate")
    parser.add_argument("--congestion", default="cubic", help="TCP's congestion control")
    given = parser.parse_args()
    chosen = [s for s in SCENARIOS if not given.only or s.name in given.only]
    more = dict(pair.split("=", 1) for pair in given.set)
    chosen = [
        replace(
            s,
            settings={**s.settings, **more},
            plan=replace(s.plan, mbit=given.mbit, congestion=given.congestion),
        )
        for s in chosen
    ]
    outcomes: dict[str, list[Outcome]] = {}
    with place(256 * MIB) as where:
        for _ in range(given.repeat):
            for scenario in chosen:
                outcome = run(where, scenario)
                outcomes.setdefault(scenario.name, []).append(outcome)
                show(outcome)
    for name, found in outcomes.items():
        of_bound = statistics.median(o.of_bound for o in found)
        egress = statistics.median(o.egress for o in found)
        print(f"{name}: {of_bound:.2f} of the bound, egress {egress:.2f}")


def show(outcome: Outcome) -> None:
    """Print one run."""
    times = " ".join(f"{s:.1f}" for s in outcome.seconds)
    cpu = statistics.median(outcome.cpu_s)
    print(
        f"{outcome.scenario}: {times} s, {outcome.of_bound:.2f} of {outcome.bound_s:.1f} s; "
        f"egress {outcome.egress:.3f}; {cpu:.2f} CPU s a node",
        _faults(outcome.fault_s),
        *outcome.errors,
        flush=True,
    )


def _faults(seconds: tuple[float, ...]) -> str:
    if not seconds:
        return ""
    ordered = sorted(seconds)
    p50, p90 = statistics.median(ordered), ordered[int(0.9 * (len(ordered) - 1))]
    return f"; faults p50 {p50 * 1e3:.0f} p90 {p90 * 1e3:.0f} max {ordered[-1] * 1e3:.0f} ms"


if __name__ == "__main__":
    main()
