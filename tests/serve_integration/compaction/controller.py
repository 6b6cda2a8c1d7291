"""What the tests' Serve controller runs: the plug-in, with a few strings to pull.

test/place     app -> node: where its next replica goes
test/hold      while it is true, warming does not end
test/warmed    every call for warmth: node -> URIs
test/agents    while it is true, agents are asked, such as there are
test/broken    while it is true, looking at the cluster fails
"""

import time
from collections.abc import Mapping

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import facts, pilot, plugin
from weightstream.serve_integration.compaction.warming import warm_by_agents


def install() -> None:
    """Called by Ray in the controller."""
    cluster_facts, destination = facts.cluster_facts, pilot.Pilot.destination

    def watched_facts() -> facts.ClusterFacts:
        if registry.recall("test/broken"):
            raise RuntimeError("broken by a test")
        return cluster_facts()

    def placed(self: pilot.Pilot, name: str, offered: object) -> str | None:
        places = registry.recall("test/place")
        wanted = places.get(name.partition("/")[0]) if isinstance(places, dict) else None
        return wanted or destination(self, name, offered)  # type: ignore[arg-type]

    facts.cluster_facts = watched_facts
    pilot.Pilot.destination = placed  # type: ignore[method-assign]
    plugin.install(warm, held)


def install_where_ray_lacks_something() -> None:
    """Called by Ray in the controller: as if one of Ray's methods had been renamed."""
    plugin._OVERRIDDEN = (*plugin._OVERRIDDEN, "_find_a_node_by_another_name")
    plugin.install()


def warm(wanted: Mapping[str, tuple[str, ...]], timeout_s: float) -> str:
    """Note who is to be warmed, and take as long as a test wants."""
    before = registry.recall("test/warmed")
    registry.note("test/warmed", [*(before if isinstance(before, list) else []), wanted])
    while registry.recall("test/hold"):
        time.sleep(0.05)
    return warm_by_agents(wanted, timeout_s) if registry.recall("test/agents") else ""


def held(uris: tuple[str, ...]) -> Mapping[str, Mapping[str, int]]:
    """Nobody holds anything."""
    return {}
