"""The raylets, asked directly: which worker processes a node has, and to start more.

`NodeManagerService` is private to Ray; its stubs ship in Ray's wheel (2.60). Everything here that a
release of Ray could take away ends as one ClusterError. Asking costs a node 2 ms and no worker: a
task that looked around on the node would use up one of the very processes it counts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from weightstream.errors import ClusterError

ANSWER_TIMEOUT_S = 5.0
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")  # the node goes, or is busy


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive and takes replicas."""

    id: str
    address: str
    """`host:port` of its raylet."""
    cpus: float


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process that has reported to its raylet."""

    id: str
    pid: int
    untouched: bool
    """It belongs to no job and has run nothing: any replica may get it."""


class Raylets:
    """The raylets of the cluster that this process is connected to; close it after use."""

    def __init__(self) -> None:
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._channels: dict[str, Any] = {}
        try:
            from ray._private.grpc_utils import init_grpc_channel
            from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

            self._python = common_pb2.PYTHON
            self._messages = node_manager_pb2
            self._stub = node_manager_pb2_grpc.NodeManagerServiceStub
            self._connect: Callable[[str], Any] = init_grpc_channel  # with TLS and token, if on
            self._metadata = (("ray_cluster_id", self._gcs.cluster_id.hex()),)
        except (ImportError, AttributeError) as error:
            raise _gone(error) from error

    def nodes(self) -> list[Node]:
        """Return the nodes with CPUs or GPUs, those that are being drained left out.

        Raises ClusterError, a transient one, when the head does not answer.
        """
        try:
            leaving = self._gcs.get_draining_nodes(timeout=ANSWER_TIMEOUT_S)
            known = ray.nodes()
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray does not name its nodes: {error}", transient=True) from error
        return [
            _node(one)
            for one in known
            if one["Alive"] and one["NodeID"] not in leaving and _takes_replicas(one["Resources"])
        ]

    def workers(self, nodes: Iterable[Node]) -> dict[str, list[Worker] | str]:
        """Return each node's worker processes, or why it did not say, by the node's id.

        Raises ClusterError when Ray refuses the question, or no longer knows it.
        """
        question = self._message("GetNodeStatsRequest")
        return {
            node: answer if isinstance(answer, str) else _workers(answer)
            for node, answer in self._ask("GetNodeStats", {node: question for node in nodes})
        }

    def start(self, counts: Mapping[Node, int], keep_alive_s: int) -> dict[str, str]:
        """Start that many more workers on each node; return who did not answer, and why.

        They come on top of those that are there. Ray ends one that waits for longer than
        `keep_alive_s`, unless the node has CPUs to spare.
        """
        requests = {}
        for node, count in counts.items():
            request = self._message("PrestartWorkersRequest")
            request.language, request.num_workers = self._python, count
            request.keep_alive_duration_secs = keep_alive_s
            request.runtime_env_info.serialized_runtime_env = "{}"
            requests[node] = request
        answers = self._ask("PrestartWorkers", requests)
        return {node: answer for node, answer in answers if isinstance(answer, str)}

    def close(self) -> None:
        """Hang up."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def __enter__(self) -> "Raylets":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _message(self, name: str) -> Any:
        try:
            return getattr(self._messages, name)()
        except AttributeError as error:
            raise _gone(error) from error

    def _ask(self, method: str, questions: Mapping[Node, Any]) -> list[tuple[str, Any]]:
        """Ask all nodes at once; a node's answer is text when it gave none."""
        self._forget_all_but({node.address for node in questions})
        under_way = []
        for node, question in questions.items():
            call = getattr(self._stub(self._channel(node.address)), method, None)
            if call is None:
                raise _gone(f"NodeManagerService has no {method}")
            future = call.future(question, timeout=ANSWER_TIMEOUT_S, metadata=self._metadata)
            under_way.append((node, future))
        return [(node.id, _answer(node, method, future)) for node, future in under_way]

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = self._connect(address)
        return self._channels[address]

    def _forget_all_but(self, addresses: set[str]) -> None:
        for address in self._channels.keys() - addresses:
            self._channels.pop(address).close()


def _node(one: Mapping[str, Any]) -> Node:
    address = f"{one['NodeManagerAddress']}:{one['NodeManagerPort']}"
    return Node(one["NodeID"], address, one["Resources"].get("CPU", 0))


def _takes_replicas(resources: Mapping[str, float]) -> bool:
    return any(resources.get(kind, 0) > 0 for kind in ("CPU", "GPU"))


def _workers(answer: Any) -> list[Worker]:
    found = answer.core_workers_stats
    return [Worker(one.worker_id.hex(), one.pid, _untouched(one)) for one in found]


def _untouched(stats: Any) -> bool:
    """Say whether a process is a plain worker (type 0) without job, actor or past."""
    belongs = any(byte != 0xFF for byte in stats.job_id + stats.actor_id)
    return stats.worker_type == 0 and not belongs and stats.num_executed_tasks == 0


def _answer(node: Node, method: str, future: Any) -> Any:
    import grpc  # type: ignore[import-untyped]

    try:
        return future.result()
    except grpc.RpcError as error:
        code = str(error.code().name)
        if code in _PASSING:
            return code
        text = f"the raylet at {node.address} refuses {method}: {code}"
        raise ClusterError(f"{text}; no processes are started ahead") from error


def _gone(why: object) -> ClusterError:
    return ClusterError(
        f"Ray {ray.__version__} lacks what starts processes ahead ({why}); it is off, all else runs"
    )
