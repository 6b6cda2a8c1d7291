"""docs/scaling.md says what the code does."""

import inspect
import re
from pathlib import Path

from weightstream.serve_integration.scaling.options import autoscaling, bounded_queue

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_every_wish_is_listed_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|\s*`?([^|`]*?)`?\s*\|", PAGE, re.MULTILINE))
    assert rows == {
        name: "" if one.default is one.empty else repr(one.default)
        for name, one in inspect.signature(autoscaling).parameters.items()
    }


def test_the_queues_signature_is_the_real_one() -> None:
    parameters = inspect.signature(bounded_queue).parameters.values()
    shown = ", ".join(
        one.name if one.default is one.empty else f"{one.name}={one.default!r}"
        for one in parameters
    )
    assert f"`bounded_queue({shown})`" in PAGE
