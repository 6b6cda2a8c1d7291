"""Who is a member, judged from what each address answered when. Pure: the clock is an argument."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from weightstream.p2p.members.addresses import Address
from weightstream.p2p.members.hello import Hello
from weightstream.p2p.members.member import Member

BEAT_S = 1.0
"""Between two hellos to one address."""

ANSWER_S = 1.0
"""Longest wait for the answer to one."""

DEAD_S = 3.0
"""Without an answer for this long, from the first hello that failed, a member is out."""

_MOST_HELLOS_A_SECOND = 200


@dataclass(frozen=True, slots=True)
class Record:
    """What one address answered so far. Times are monotonic seconds."""

    hello: Hello | None = None
    """The last answer."""
    answered_s: float = 0.0
    joined_s: float = 0.0
    """Since when it is alive without a break."""
    failing_s: float | None = None
    """When the first hello was sent that failed since the last answer."""
    suspected_s: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Who is a member now, and where two nodes use one name."""

    members: tuple[Member, ...] = ()
    doubles: frozenset[tuple[str, Address, Address]] = frozenset()
    """A name, who had it first, who is left out."""
    has_namesakes: bool = False
    """Some name is used at several addresses: every answer may tell more about it."""


def beat_s(addresses: int, record: Record | None, now_s: float) -> float:
    """Return the time from one hello to the next at one address.

    Longer in crowds of more than 200, but not for a member that began to fail: one lost hello must
    not be all that is known of it when its time is up.
    """
    if record is not None and record.failing_s is not None and is_alive(record, now_s):
        return BEAT_S
    return max(BEAT_S, addresses / _MOST_HELLOS_A_SECOND)


def answered(record: Record, hello: Hello, sent_s: float, now_s: float) -> Record:
    """Return the record after an answer to a hello that was sent at a time."""
    suspected = record.suspected_s is not None and record.suspected_s >= sent_s
    before = record.hello
    goes_on = before is not None and before.node == hello.node and is_alive(record, now_s)
    return Record(
        hello=hello,
        answered_s=now_s,
        joined_s=record.joined_s if goes_on else now_s,
        suspected_s=record.suspected_s if suspected else None,
    )


def failed(record: Record, sent_s: float) -> Record:
    """Return the record after a hello that was sent at a time and failed."""
    return record if record.failing_s is not None else replace(record, failing_s=sent_s)


def suspected(record: Record, now_s: float) -> Record:
    """Return the record after somebody else saw the member fail."""
    return replace(record, suspected_s=now_s)


def is_alive(record: Record, now_s: float) -> bool:
    """Say whether who answered there is a member."""
    if record.hello is None or record.suspected_s is not None:
        return False
    return record.failing_s is None or now_s - record.failing_s < DEAD_S


def look(records: Mapping[Address, Record], node: str, instance: str, now_s: float) -> View:
    """Return the members; `node` and `instance` are oneself, who is none.

    Who answers comes before who fails, and who came first before who came later. So a node that
    moved to another address is taken at the new one, and one that uses the name of another (a copy
    of its store) is left out. One process at two addresses is no double.
    """
    alive = [(a, r, r.hello) for a, r in records.items() if r.hello and is_alive(r, now_s)]
    alive.sort(key=lambda one: (one[1].failing_s is not None, one[1].joined_s, one[0]))
    taken: dict[str, tuple[Address, Record, Hello]] = {}
    doubles = set()
    has_namesakes = False
    for address, record, hello in alive:
        if hello.node == node:
            if hello.instance and hello.instance != instance:
                doubles.add((node, address, address))
            continue
        first = taken.setdefault(hello.node, (address, record, hello))
        if first[0] != address:
            has_namesakes = True
            if _are_two(first, (address, record, hello)):
                doubles.add((hello.node, first[0], address))
    members = (
        Member(hello.node, address.host, address.port, hello.zone)
        for address, _, hello in taken.values()
    )
    return View(
        tuple(sorted(members, key=lambda member: member.node)), frozenset(doubles), has_namesakes
    )


def _are_two(first: tuple[Address, Record, Hello], second: tuple[Address, Record, Hello]) -> bool:
    """Say whether two addresses of one name are two nodes: both answered while both were there."""
    if first[2].instance and first[2].instance == second[2].instance:
        return False
    both_s = max(first[1].joined_s, second[1].joined_s)
    return first[1].answered_s >= both_s and second[1].answered_s >= both_s


def next_death_s(records: Collection[Record], now_s: float) -> float | None:
    """Return when the next member that fails is out, if it goes on; None when nobody fails."""
    times = [
        record.failing_s + DEAD_S
        for record in records
        if record.failing_s is not None and is_alive(record, now_s)
    ]
    return min(times, default=None)
