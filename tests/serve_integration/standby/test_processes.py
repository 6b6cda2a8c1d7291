"""How many processes to start: what is missing, never more, whatever happens in between."""

from hypothesis import given
from hypothesis import strategies as st

from weightstream.serve_integration.standby.processes import Pool, asked, look, missing
from weightstream.serve_integration.standby.raylets import Worker


def waits(*names: str) -> list[Worker]:
    return [Worker(name, 1, untouched=True) for name in names]


def test_only_what_is_missing_is_started() -> None:
    assert missing(wanted=2, idle=0, starting=0, cpus=8) == 2
    assert missing(wanted=2, idle=1, starting=0, cpus=8) == 1
    assert missing(wanted=2, idle=1, starting=1, cpus=8) == 0
    assert missing(wanted=1, idle=3, starting=0, cpus=8) == 0


def test_no_more_start_at_once_than_ray_takes() -> None:
    assert missing(wanted=8, idle=0, starting=0, cpus=8) == 2
    assert missing(wanted=8, idle=0, starting=2, cpus=8) == 0
    assert missing(wanted=2, idle=0, starting=0, cpus=1) == 1
    assert missing(wanted=2, idle=0, starting=0, cpus=0.5) == 1


def test_what_reports_is_no_longer_starting() -> None:
    pool = asked(look(Pool(), [], 0), 2, now_s=0)
    assert len(pool.asked_at_s) == 2
    assert len(look(pool, waits("a"), 1).asked_at_s) == 1
    assert look(pool, waits("a", "b", "c"), 1).asked_at_s == ()


def test_a_worker_that_was_known_or_works_answers_for_none() -> None:
    pool = asked(look(Pool(), waits("old"), 0), 1, now_s=0)
    busy = Worker("busy", 2, untouched=False)
    assert len(look(pool, [*waits("old"), busy], 1).asked_at_s) == 1


def test_what_never_reports_is_given_up_after_a_minute() -> None:
    pool = asked(Pool(), 1, now_s=100)
    assert len(look(pool, [], 159).asked_at_s) == 1
    assert look(pool, [], 160).asked_at_s == ()


EVENTS = st.lists(st.sampled_from(["report", "use", "others start", "wait"]), max_size=60)


@given(wanted=st.integers(0, 5), cpus=st.floats(0, 64), events=EVENTS)
def test_processes_never_pile_up(wanted: int, cpus: float, events: list[str]) -> None:
    """Whatever starts, reports and is used between two looks."""
    pool, starting, workers = Pool(), 0, list[Worker]()
    for now_s, event in enumerate(events):
        if event == "report" and starting:
            starting -= 1
            workers.append(Worker(str(now_s), now_s, untouched=True))
        elif event == "use" and workers:
            workers[0] = Worker(workers[0].id, 0, untouched=False)
        elif event == "others start":
            workers.append(Worker(str(now_s), now_s, untouched=False))
        pool = look(pool, workers, now_s)
        idle = sum(worker.untouched for worker in workers)
        more = missing(wanted, idle, len(pool.asked_at_s), cpus)
        pool, starting = asked(pool, more, now_s), starting + more
        assert idle + starting <= wanted
