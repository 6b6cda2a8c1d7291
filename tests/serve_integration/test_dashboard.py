"""The Grafana dashboard asks for metrics that exist, by labels that they have."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana-serve.json").read_text(encoding="utf-8"))
OURS = [*(ROOT / "serve_integration").rglob("*.py"), ROOT / "src" / "weightstream" / "metrics.py"]
_METRIC = re.compile(r"\b(?:ray_)?(?:weightstream|serve)_[a-z_]+\b")
_PROMETHEUS = {"le", "instance"}
_SERVE = {"application", "deployment"}
"""Labels that Serve gives its metrics where it sets the context, not where it declares them."""


def expressions() -> list[tuple[str, str]]:
    return [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


def declaration(metric: str) -> str:
    """Return the source that declares a metric; Ray adds `ray_`, and `_total` to counters."""
    exact = f'"{metric}"'
    if not metric.startswith("ray_"):
        return _around(OURS, exact)
    name = re.sub(r"_(bucket|sum|count|total)$", "", metric.removeprefix("ray_"))
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    theirs = sorted((Path(ray.origin).parent / "serve").rglob("*.py"))
    return _around(OURS if name.startswith("weightstream") else theirs, f'"{name}"')


def _around(files: list[Path], text: str) -> str:
    for path in files:
        source = path.read_text(encoding="utf-8")
        if text in source:
            at = source.index(text)
            return source[max(0, at - 60) : at + 600] + _constants(source)
    return ""


def _constants(source: str) -> str:
    return "".join(re.findall(r"^_TAGS = .*$", source, re.MULTILINE))


def labels(expression: str) -> Iterator[str]:
    for names in re.findall(r"\bby \(([^)]*)\)", expression):
        yield from re.split(r",\s*", names)
    for matchers in re.findall(r"\{([^}]*)\}", expression):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_metrics_of_the_dashboard_exist(title: str, expression: str) -> None:
    metrics = _METRIC.findall(expression)
    assert metrics
    for metric in metrics:
        source = declaration(metric)
        assert source, f"{title}: nothing declares {metric}"
        is_counter = re.search(r"Counter\(\s*$", source[: source.index(core(metric)) - 1])
        assert metric.endswith("_total") == bool(is_counter), f"{title}: {metric}"
        known = _PROMETHEUS | (_SERVE if metric.startswith("ray_serve") else set())
        lacking = {
            one for one in labels(expression) if one not in known and f'"{one}"' not in source
        }
        assert not lacking, f"{title}: {metric} has no label {lacking}"


def core(metric: str) -> str:
    return re.sub(r"_(bucket|sum|count|total)$", "", metric.removeprefix("ray_"))


def test_every_metric_of_loads_is_shown() -> None:
    source = (ROOT / "serve_integration" / "loading" / "noting.py").read_text(encoding="utf-8")
    declared = set(re.findall(r'"(weightstream_[a-z_]+)",\s', source))
    shown = {core(metric) for _, text in expressions() for metric in _METRIC.findall(text)}
    assert len(declared) >= 4
    assert declared <= shown


def test_the_dashboard_is_one() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Loads in replicas", "Agents of the nodes", "Scaling", "Compaction"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
