import pytest

from megarl.rewards.alarm import Alarm, nothing_to_reward
from megarl.rewards.pool import RewardPool, Verdict
from megarl.types import RewardStatus


def verdicts(correct, timeout=0, error=0):
    return [
        *[Verdict(RewardStatus.CORRECT, "5", "exact comparison")] * correct,
        *[Verdict(RewardStatus.TIMEOUT, "x^x", "more than 2 s of CPU time")] * timeout,
        *[Verdict(RewardStatus.ERROR, None, "out of memory")] * error,
    ]


def test_over_one_percent_of_missing_verdicts_raise_one_alarm_a_step_with_counts_and_an_example():
    alarm = Alarm()
    assert alarm.message(1, verdicts(500, timeout=8, error=4)) == (
        "reward alarm: 4 error, 8 timeout of 512 verdicts, which leave the loss; "
        "e.g. timeout on 'x^x': more than 2 s of CPU time"
    )
    assert alarm.message(1, verdicts(0, timeout=100)) is None
    assert "1 error of 1 verdicts" in alarm.message(2, verdicts(0, error=1))


def test_one_percent_raises_none():
    assert Alarm().message(1, verdicts(99, timeout=1)) is None
    assert Alarm().message(1, verdicts(98, timeout=2)) is not None
    assert Alarm().message(1, verdicts(10)) is None


def test_the_draws_of_a_step_count_together():
    alarm = Alarm()
    assert alarm.message(1, verdicts(200, timeout=2)) is None
    assert "3 timeout of 203 verdicts" in alarm.message(1, verdicts(0, timeout=1))


def test_the_draws_of_two_steps_may_alternate():
    alarm = Alarm()
    assert alarm.message(1, verdicts(200, timeout=1)) is alarm.message(2, verdicts(300)) is None
    assert alarm.message(1, verdicts(0, timeout=1)) is None and alarm.message(2, verdicts(0, timeout=3)) is None
    assert "3 timeout of 203 verdicts" in alarm.message(1, verdicts(0, timeout=1))
    assert "4 timeout of 304 verdicts" in alarm.message(2, verdicts(0, timeout=1))
    assert alarm.message(1, verdicts(0, timeout=1)) is None


def test_an_example_is_cut_short():
    long = Verdict(RewardStatus.TIMEOUT, "9" * 500, "slow")
    assert len(Alarm().message(1, [long])) < 250


@pytest.mark.processes
def test_progress_counts_up_to_the_whole_batch():
    batch = [(rf"\boxed{{{n}\sqrt{{3}}}}", rf"\sqrt{{{3 * n * n}}}", False) for n in (2, 2, 3, 4)]
    seen = []
    with RewardPool() as pool:
        pool.grade([*batch, (r"\boxed{5}", "5", False), ("cut", "5", True)], seen.append)
        assert seen[0] == 2 and seen[-1] == 6 and seen == sorted(seen) and len(seen) == 4
        seen.clear()
        pool.grade(batch, seen.append)
        assert seen == [4]
        seen.clear()
        pool.grade([], seen.append)
        assert seen == [0]


def of(*statuses):
    return [Verdict(status, None, "") for status in statuses]


def test_a_run_whose_first_responses_have_nothing_to_reward_says_so():
    wrong, none, cut = RewardStatus.WRONG, RewardStatus.NO_ANSWER, RewardStatus.TRUNCATED
    texts = ["I think\nit is 5"] * 3
    message = nothing_to_reward("format", of(wrong, wrong, cut), texts)
    assert message.startswith(
        "reward alarm: none of the first 3 responses has <think>...</think> <answer>...</answer> (1 truncated), so"
    )
    assert message.endswith("e.g. 'I think\\nit is 5'")
    assert "none of the first 3 responses has an answer that reward.name=math finds (1 truncated)" in nothing_to_reward(
        "math", of(none, none, cut), texts
    )
    assert "reward.name=countdown" in nothing_to_reward("countdown", of(none), texts)


def test_responses_with_something_to_judge_raise_no_alarm():
    wrong, none, right = RewardStatus.WRONG, RewardStatus.NO_ANSWER, RewardStatus.CORRECT
    assert nothing_to_reward("format", of(wrong, right), ["", ""]) is None
    assert nothing_to_reward("math", of(none, wrong), ["", ""]) is None
    assert nothing_to_reward("math", of(none, RewardStatus.ERROR), ["", ""]) is None
    assert nothing_to_reward("mine:reward", of(wrong, wrong), ["", ""]) is None
    assert nothing_to_reward("math", [], []) is None
