"""Fill a cluster that takes nobody without its token: run as a process, for Ray reads it once."""

from tests.kit.ray_cluster import NodeSpec, RayCluster

from weightstream.errors import ClusterError
from weightstream.serve_integration.standby.processes import fill
from weightstream.serve_integration.standby.raylets import Raylets


def main() -> None:
    """RAY_AUTH_MODE and RAY_AUTH_TOKEN are in the environment."""
    with RayCluster([NodeSpec()], env={"RAY_AUTH_MODE": "token"}):
        (node,) = fill(1)
        print("idle", node.idle)
        with Raylets() as raylets:
            raylets._connect = _without_token
            try:
                raylets.workers(raylets.nodes())
            except ClusterError as error:
                print("refused", error)


def _without_token(address: str) -> object:
    import grpc  # type: ignore[import-untyped]

    return grpc.insecure_channel(address)


if __name__ == "__main__":
    main()
