"""Wait until so many nodes are there and Serve runs: `python -m ... COUNT`."""

import json
import sys
import time

import ray
from ray import serve

from weightstream.bench.errors import BenchError

_TIMEOUT_S = 60.0


def main() -> None:
    """Connect, wait, start Serve with a proxy on the head."""
    wanted = int(sys.argv[1])
    ray.init(log_to_driver=False)
    deadline = time.monotonic() + _TIMEOUT_S
    while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            raise BenchError(f"{alive} of {wanted} nodes came within {_TIMEOUT_S:g} s")
        time.sleep(0.1)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": 8000})
    print(json.dumps(alive))


if __name__ == "__main__":
    main()
