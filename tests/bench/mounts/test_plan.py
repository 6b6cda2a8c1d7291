"""Which cells and variants a mount run has, and which settings later rounds repeat."""

import pytest

from weightstream.bench.jobs import Outcome, Sample
from weightstream.bench.links import LOOPBACK, Link
from weightstream.bench.mounts import plan
from weightstream.bench.mounts.execute import chosen
from weightstream.bench.mounts.peers import PEERS
from weightstream.bench.mounts.plan import MountCell, Variant, mount_cells

EVERY = mount_cells((LOOPBACK, plan.LINK))


def outcome(wall_s: float) -> Outcome:
    return Outcome(0, wall_s, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, "", False)


@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: cell.name)
def test_labels_are_of_one_variant_and_begin_with_their_family(cell: MountCell) -> None:
    labels = [variant.label for variant in cell.variants]
    assert len(labels) == len(set(labels))
    assert all(variant.label.startswith(variant.family) for variant in cell.variants)


def test_every_peer_can_be_mounted_or_is_none() -> None:
    peers = {variant.peer for cell in EVERY for variant in cell.variants}
    assert peers == set(plan.PEERS)
    assert peers - {"native", "curl"} == set(PEERS)


def test_ours_is_in_every_cell() -> None:
    assert all(plan.OURS in [v.label for v in cell.variants] for cell in EVERY)


def test_shaped_cell_needs_its_link() -> None:
    names = [cell.name for cell in mount_cells((LOOPBACK, Link("2gbit", 2.0)))]
    assert plan.COLD in names
    assert plan.COLD_LINK not in names


def test_quick_takes_the_first_setting_of_each_family() -> None:
    for cell, full in zip(mount_cells((plan.LINK,), quick=True), EVERY, strict=True):
        wanted = full.variants[:1] if cell.name == plan.HOLD else full.variants
        firsts = {variant.family: variant for variant in reversed(wanted)}
        assert {variant.family: variant for variant in cell.variants} == firsts
        assert cell.rounds == 1


def cell_of(*variants: Variant, rivals: bool = True) -> MountCell:
    return MountCell("c", "", "read", "whole", variants, rivals=rivals)


def sample(variant: Variant, wall_s: float = 0.0) -> Sample:
    return Sample("c", variant.label, 0, outcome(wall_s) if wall_s else None)


def variant(family: str, setting: str = "x") -> Variant:
    return Variant(f"{family}, {setting}", family, family)


OURS, SLOW, FAST, OTHER, THIRD = (
    Variant(plan.OURS, "weightstream", plan.OURS), variant("a", "slow"), variant("a", "fast"),
    variant("b"), variant("c"),
)  # fmt: skip
VARIANTS = (OURS, SLOW, FAST, OTHER, THIRD)
SAMPLES = [sample(v, wall) for v, wall in zip(VARIANTS, (1.0, 3.0, 2.0, 9.0, 8.0), strict=True)]


def test_later_rounds_repeat_the_two_fastest_peers_at_their_best() -> None:
    assert chosen(cell_of(*VARIANTS), SAMPLES) == (OURS, FAST, THIRD)


def test_later_rounds_repeat_no_peer_that_nothing_is_compared_with() -> None:
    cell = cell_of(*VARIANTS, rivals=False)
    assert chosen(cell, SAMPLES) == (OURS,)
    assert cell.passes_of(FAST) == 1


def test_later_rounds_leave_out_what_only_failed_but_never_ours() -> None:
    samples = [sample(OURS), sample(OTHER), sample(THIRD, 8.0)]
    assert chosen(cell_of(OURS, OTHER, THIRD), samples) == (OURS, THIRD)


def test_cells_whose_best_peer_counts_repeat_it() -> None:
    assert {cell.name for cell in EVERY if cell.rivals} == {plan.COLD, plan.TENSORS, plan.LIST}
