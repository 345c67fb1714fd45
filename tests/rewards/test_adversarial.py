"""No response costs a run more than its CPU budget, touches a file or is paid for what it doesn't say."""

import os
import resource
import time
from collections import Counter

import psutil
import pytest
from adversarial import ADVERSARIAL, REFERENCES

from megarl.rewards.extraction import lenient_answer
from megarl.rewards.pool import RewardPool
from megarl.types import RewardStatus

pytestmark = pytest.mark.processes

BUDGET = 2.0  # CPU-seconds for one answer, parent and workers together
PARENT_MIB = 300


def workers():
    return [child for child in psutil.Process().children() if "megarl.rewards.worker" in " ".join(child.cmdline())]


def cpu_seconds():
    """Of this process, of its workers, and of the workers that it has reaped."""
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = sum(sum(worker.cpu_times()[:2]) for worker in workers())
    return time.process_time() + reaped.ru_utime + reaped.ru_stime + alive


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The status and CPU time of every answer, and what became of a folder with a canary and of the parent's memory."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "canary").write_text("alive")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setenv("TMPDIR", str(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with RewardPool(cpu_seconds=BUDGET / 2) as pool:
            rows = {}
            for i, (name, response) in enumerate(ADVERSARIAL.items()):
                pool.check()  # so that the start of a worker is nobody's cost
                start = cpu_seconds()
                (verdict,) = pool.grade([(response, REFERENCES[i % len(REFERENCES)], False)])
                rows[name] = (verdict, cpu_seconds() - start)
            after = pool.grade([(r"\boxed{2\sqrt{3}}", r"\sqrt{12}", False), (r"\boxed{6}", r"\sqrt{36}", False)])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        files = {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}
    return rows, after, grown, files


def test_there_are_at_least_100_adversarial_answers():
    assert len(ADVERSARIAL) >= 100


def test_each_is_graded_within_two_cpu_seconds(outcome):
    rows, *_ = outcome
    slowest = sorted(rows, key=lambda name: -rows[name][1])
    print("\n" + "\n".join(f"{rows[name][1]:6.2f} s  {rows[name][0].status:10} {name}" for name in slowest[:15]))
    print(Counter(str(verdict.status) for verdict, _ in rows.values()))
    assert rows[slowest[0]][1] <= BUDGET, slowest[:3]


def test_none_is_accepted_and_nearly_all_get_a_verdict(outcome):
    rows, *_ = outcome
    accepted = [name for name, (verdict, _) in rows.items() if verdict.status is RewardStatus.CORRECT]
    failed = [name for name, (verdict, _) in rows.items() if not verdict.status.is_verdict]
    assert not accepted
    assert len(failed) <= 0.05 * len(rows), failed


def test_no_file_is_touched(outcome):
    *_, files = outcome
    assert files == {"canary": "alive"}


def test_the_parent_lives_keeps_its_memory_and_grades_on(outcome):
    _, after, grown, _ = outcome
    assert [verdict.status for verdict in after] == ["correct", "correct"]
    assert grown < PARENT_MIB
    assert os.getpid() == psutil.Process().pid


def test_a_whole_batch_of_them_costs_no_other_answer_its_verdict():
    easy = [(rf"\boxed{{{n}\sqrt{{3}}}}", rf"\sqrt{{{3 * n * n}}}", False) for n in range(2, 12)]
    hard = [(response, "5", False) for response in list(ADVERSARIAL.values())[:60]]
    batch = [item for pair in zip(hard, easy * 6, strict=True) for item in pair]
    with RewardPool(workers=2, cpu_seconds=0.5) as pool:
        verdicts = pool.grade(batch)
    assert {verdict.status for verdict in verdicts[1::2]} == {RewardStatus.CORRECT}
    assert RewardStatus.CORRECT not in {verdict.status for verdict in verdicts[::2]}


def test_lenient_extraction_is_as_quick():
    for response in ADVERSARIAL.values():
        start = time.process_time()
        lenient_answer(response)
        assert time.process_time() - start < BUDGET
