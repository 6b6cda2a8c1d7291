"""Pure policy: whose chunks a node takes over when it has begun all of its own.

Homes read at different rates: streams share an origin's link unfairly, a link is slow, a node came
too late to be home of anything. Everybody would wait for the last chunks of the slowest. So who has
nothing left to begin asks a home for a chunk that it has not begun. The home alone decides, so a
chunk is given once; it sends on to the taker whoever asks for it. Who stands in for a home that is
down gives its chunks in the same way: it has more to read than others.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from weightstream.p2p.schedule.routes import View, acting_home


def givers(view: View, lacking: Iterable[int], may_have: Callable[[str], bool]) -> tuple[str, ...]:
    """Return whom to ask for a chunk: who reads what is `lacking` here, of the most first.

    `may_have` says whether a node may still have chunks that it has not begun. Slow homes are
    asked like others: it is their chunks that everybody is going to wait for.
    """
    counts = Counter(acting_home(view, chunk) for chunk in lacking if chunk not in view.moved)
    asked = [node for node in counts if node != view.me]
    return tuple(sorted(filter(may_have, asked), key=lambda node: (-counts[node], node)))
