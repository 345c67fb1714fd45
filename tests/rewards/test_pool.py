import contextlib
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megarl.rewards.pool import RewardPool, Verdict, worker_count
from megarl.types import RewardStatus, UserError

pytestmark = pytest.mark.processes

EQUIVALENT = [(rf"{n}\sqrt{{3}}", rf"\sqrt{{{3 * n * n}}}") for n in range(2, 8)]
DIFFERENT = [(rf"{n}\sqrt{{3}}", rf"\sqrt{{{3 * n * n + 1}}}") for n in range(2, 8)]
LONG = r"(\sin(x)+\cos(y)+z^3)^{40}=\tan(x)^{13}+y^7"  # passes the guards, then simplifies for minutes
ENDLESS = (LONG, LONG.replace("y^7", "y^8"))


def items(pairs):
    return [(rf"Thus \boxed{{{answer}}}.", reference, False) for answer, reference in pairs]


def statuses(verdicts):
    return [verdict.status for verdict in verdicts]


def workers():
    """Other tests of the session have children too; one may end while it is looked at."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            found += [child] if "megarl.rewards.worker" in " ".join(child.cmdline()) else []
    return found


def wait_until(condition, seconds=300.0):  # on a busy machine a worker takes long to start
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def all_wait_for_questions():
    """Whether no worker has used any CPU time for a while: all are up, and none has a question."""
    before = [worker.cpu_times()[:2] for worker in workers()]
    time.sleep(0.5)
    return before == [worker.cpu_times()[:2] for worker in workers()]


@contextlib.contextmanager
def grading(pool, batch):
    """Grades in a thread while the block runs; yields the list that holds the verdicts afterwards."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(pool.grade(batch)))
    thread.start()
    try:
        yield verdicts
    finally:
        thread.join()


@pytest.fixture
def pool():
    with RewardPool() as pool:
        yield pool


def test_what_needs_no_computer_algebra_starts_no_worker():
    with RewardPool() as pool:
        verdicts = pool.grade(
            [
                (r"\boxed{1/2}", "0.5", False),
                (r"\boxed{2}", "3", False),
                (r"\boxed{9^{9^9}}", "5", False),
                ("no box", "5", False),
                (r"\boxed{ }", "5", False),
                (r"\boxed{5}", "5", True),
            ]
        )
        assert verdicts == [
            Verdict(RewardStatus.CORRECT, "1/2", "exact comparison"),
            Verdict(RewardStatus.WRONG, "2", "exact comparison"),
            Verdict(RewardStatus.WRONG, "9^{9^9}", "guard: tower of exponents"),
            Verdict(RewardStatus.NO_ANSWER, None, "no answer"),
            Verdict(RewardStatus.NO_ANSWER, None, "no answer"),
            Verdict(RewardStatus.TRUNCATED, None, "truncated"),
        ]
        assert pool.checked == 0 and not workers()


def test_an_empty_batch_has_no_verdicts(pool):
    assert pool.grade([]) == []


def test_answers_are_checked_in_workers_and_verdicts_keep_the_order(pool):
    batch = items([*EQUIVALENT[:2], ("5", "5"), *DIFFERENT[:2], (r"\frac{", "5"), EQUIVALENT[2]])
    expected = ["correct", "correct", "correct", "wrong", "wrong", "no_answer", "correct"]
    assert statuses(pool.grade(batch)) == expected


def test_a_distinct_answer_is_checked_once(pool):
    before = pool.checked
    batch = items([(r"11\sqrt{2}", r"\sqrt{242}")] * 8 + [(r"11\sqrt{2}", r"\sqrt{243}")] * 8)
    assert statuses(pool.grade(batch)) == ["correct"] * 8 + ["wrong"] * 8
    assert pool.grade(batch) == pool.grade(batch)
    assert pool.checked == before + 2


def test_text_that_is_not_ascii_travels_to_the_worker(pool):
    assert statuses(pool.grade(items([("\ud800 é ½\n", "x"), ("x", "y" * 5000)]))) == ["wrong", "wrong"]


def test_verdicts_depend_on_neither_the_number_of_workers_nor_the_order():
    batch = items(EQUIVALENT[:3] + DIFFERENT[:3])
    with RewardPool(workers=1) as one, RewardPool(workers=2) as two:
        assert one.grade(batch) == two.grade(batch[::-1])[::-1]
        assert len(workers()) == 3


def test_verdicts_do_not_depend_on_the_load():
    batch = items([*EQUIVALENT[:2], ENDLESS, *DIFFERENT[:2], (r"\frac{", "5")])
    with RewardPool(workers=2, cpu_seconds=0.5) as pool:
        quiet = pool.grade(batch)
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        with RewardPool(workers=2, cpu_seconds=0.5) as pool:
            loaded = pool.grade(batch)
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert loaded == quiet and statuses(quiet)[2] == "timeout"


def test_an_answer_over_the_cpu_budget_is_a_timeout_and_the_pool_goes_on():
    with RewardPool(cpu_seconds=0.5) as pool:
        batch = items([EQUIVALENT[0], ENDLESS, EQUIVALENT[1], DIFFERENT[0]])
        assert statuses(pool.grade(batch)) == ["correct", "timeout", "correct", "wrong"]
        assert statuses(pool.grade(items([ENDLESS]))) == ["timeout"]
        assert pool.checked == 5  # a timeout is no verdict: not cached


@pytest.mark.parametrize("reference", ["x=y^2+1", "(x+y)^{40}=1"])
def test_an_answer_can_not_choose_a_timeout_over_wrong(reference):
    with RewardPool(cpu_seconds=0.5) as pool:
        (verdict,) = pool.grade(items([(LONG, reference)]))
        assert verdict.status == "wrong" and "much more than the reference" in verdict.reason


def test_only_cpu_time_counts_against_the_budget():
    with RewardPool(cpu_seconds=0.5) as pool:
        pool.grade(items(EQUIVALENT[:1]))
        (worker,) = workers()
        worker.suspend()
        with grading(pool, items(EQUIVALENT[1:2])) as verdicts:
            time.sleep(1.0)
            worker.resume()
        assert statuses(verdicts) == ["correct"] and workers() == [worker]


def test_a_worker_killed_in_the_middle_of_a_batch_loses_no_verdict():
    with RewardPool() as pool:
        pool.grade(items(EQUIVALENT[:1]))
        (worker,) = workers()
        worker.suspend()  # so that it is killed with a question in hand
        with grading(pool, items(EQUIVALENT[1:3] + DIFFERENT[:1])) as verdicts:
            wait_until(lambda: pool.checked == 4)
            time.sleep(0.2)
            worker.kill()
        assert statuses(verdicts) == ["correct", "correct", "wrong"]


def test_a_stopped_worker_is_replaced_after_the_wall_time_backstop():
    with RewardPool(wall_seconds=2.0) as pool:
        pool.grade(items(EQUIVALENT[:3]))
        (stopped,) = workers()
        stopped.suspend()
        assert statuses(pool.grade(items(EQUIVALENT[3:] + DIFFERENT[:2]))) == ["correct"] * 3 + ["wrong"] * 2
        assert stopped not in workers()


def test_two_of_three_workers_stopped_and_killed_in_mid_batch_lose_no_verdict():
    with RewardPool(workers=3, wall_seconds=3.0) as pool:
        pool.grade(items(EQUIVALENT[:3]))
        wait_until(all_wait_for_questions)
        stopped, killed, _ = workers()
        for worker in (stopped, killed):
            worker.suspend()
        batch = EQUIVALENT[3:] + DIFFERENT
        with grading(pool, items(batch)) as verdicts:
            wait_until(lambda: pool.checked == 3 + len(batch))
            time.sleep(0.2)
            killed.kill()
        assert statuses(verdicts) == ["correct"] * 3 + ["wrong"] * 6
        assert not {stopped, killed} & set(workers())


def test_an_answer_that_two_workers_die_on_is_an_error_and_no_other_answer_is():
    def most_cpu_seconds():
        return max((sum(worker.cpu_times()[:2]) for worker in workers()), default=0.0)

    def kill_a_busy_worker():
        wait_until(lambda: most_cpu_seconds() > 2 * start + 1)
        (worker,) = workers()
        worker.kill()
        wait_until(lambda: worker not in workers())

    with RewardPool(cpu_seconds=600.0, wall_seconds=600.0) as pool:
        pool.check()
        start = most_cpu_seconds()  # a worker that has used more is at a question
        with grading(pool, items([ENDLESS, EQUIVALENT[0], DIFFERENT[0]])) as verdicts:
            kill_a_busy_worker()
            kill_a_busy_worker()
        assert statuses(verdicts) == ["error", "correct", "wrong"]


def test_a_worker_is_replaced_after_its_share_of_answers():
    with RewardPool(recycle_after=2) as pool:
        seen = set()
        for pair in EQUIVALENT[:4]:
            assert statuses(pool.grade(items([pair]))) == ["correct"]
            seen.update(worker.pid for worker in workers())
        assert len(seen) == 2 and not workers()


def test_memory_is_capped_and_a_worker_that_cannot_start_is_reported():
    with RewardPool(memory_bytes=16 << 20) as pool:
        with pytest.raises(RuntimeError, match="in a row were lost at their start"):
            pool.grade(items(EQUIVALENT[:1]))
        assert not workers()


def test_closing_leaves_no_process_and_the_pool_can_be_used_again():
    pool = RewardPool(workers=2)
    pool.grade(items(EQUIVALENT[:3]))
    assert len(workers()) == 2
    pool.close()
    assert not workers()
    assert statuses(pool.grade(items(EQUIVALENT[3:4]))) == ["correct"]
    pool.close()
    assert not workers()


def test_workers_idle_or_busy_do_not_outlive_a_killed_parent():
    script = (
        "import sys; from megarl.rewards.pool import RewardPool\n"
        "pool = RewardPool(workers=2, cpu_seconds=0.2)\n"
        f"pool.grade({items(EQUIVALENT[:3])!r}); print(flush=True)\n"
        f"pool.grade({items([ENDLESS])!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout
    parent.stdout.readline()
    orphans = psutil.Process(parent.pid).children()
    assert len(orphans) == 2
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(orphans, timeout=20)
    assert not alive


def test_a_worker_imports_no_torch_and_leads_its_own_process_group(pool):
    pool.grade(items([(r"13\sqrt{2}", r"\sqrt{338}")]))
    (worker,) = workers()
    assert os.getpgid(worker.pid) == worker.pid
    assert not [region.path for region in worker.memory_maps() if "torch" in region.path]


def test_lenience_grades_a_response_without_a_box():
    responses = ["The answer is $2\\sqrt{3}$.", "So we get 7.", "no idea", r"\boxed{5}, not 7"]
    batch = [(response, r"\sqrt{12}" if "sqrt" in response else "7", False) for response in responses]
    with RewardPool(lenient=True) as lenient, RewardPool() as strict:
        assert statuses(lenient.grade(batch)) == ["correct", "correct", "no_answer", "wrong"]
        assert statuses(strict.grade(batch)) == ["no_answer", "no_answer", "no_answer", "wrong"]


def test_threads_that_grade_at_once_all_get_their_verdicts(pool):
    batches = [EQUIVALENT[:3], DIFFERENT[:3], EQUIVALENT[3:], DIFFERENT[3:]]
    with contextlib.ExitStack() as stack:
        results = [stack.enter_context(grading(pool, items(batch))) for batch in batches]
    assert [statuses(verdicts) for verdicts in results] == [["correct"] * 3, ["wrong"] * 3] * 2


def test_a_machine_gives_a_quarter_of_its_cores_to_grading():
    assert [worker_count(cores) for cores in (1, 2, 7, 8, 16, 64, 256)] == [1, 1, 1, 2, 4, 16, 16]


def test_impossible_settings_are_named():
    with pytest.raises(UserError, match="reward.name='chess': there is math, countdown, format"):
        RewardPool(reward="chess")
    with pytest.raises(UserError, match="workers"):
        RewardPool(workers=0)
