"""A reward of the user's own, from a module in the folder that megarl is started in."""

import pytest

from megarl.config import RewardConfig, parse_config
from megarl.data.prompts import load_splits
from megarl.preflight import check_reward
from megarl.rewards.pool import RewardPool
from megarl.types import UserError

pytestmark = pytest.mark.processes

MODULE = """\
import os, sys, time

print("imported", flush=True)


def ends_with(response: str, answer: str) -> bool:
    return response.endswith(answer)


def moods(response, answer):
    print("noise", flush=True)
    os.write(1, b"noise"), os.write(2, b"noise")
    match response:
        case "raise":
            raise RuntimeError("no idea")
        case "leave":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), 9)
        case "stop":
            os.kill(os.getpid(), 19)
        case "spin":
            while True:
                pass
        case "memory":
            return bytearray(1 << 40) == b""
        case "text":
            return "yes"
        case "none":
            return None
        case "half":
            return 0.5
        case "read":
            return sys.stdin.read() == ""
        case "number":
            return 1.0
    return len(response) > 3


def one_argument(response):
    return True


async def later(response, answer):
    return True


NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "grader.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "leaving.py").write_text("raise SystemExit(2)")
    (tmp_path / "dying.py").write_text("import os; os.kill(os.getpid(), 11)")
    (tmp_path / "types.py").write_text("def grade(response, answer): return True")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def statuses(verdicts):
    return [verdict.status for verdict in verdicts]


def test_a_users_function_sees_the_response_and_the_reference(folder):
    with RewardPool(reward="grader:ends_with") as pool:
        verdicts = pool.grade([("it is 5", "5", False), ("it is 5", "6", False), ("it is 5", "5", True)])
    assert statuses(verdicts) == ["correct", "wrong", "truncated"]
    assert [verdict.extracted for verdict in verdicts] == [None] * 3


def test_whatever_it_does_costs_its_own_verdict_only(folder):
    moods = {
        "long": "correct",
        "raise": "error",
        "no": "wrong",
        "leave": "error",
        "kill": "error",
        "spin": "timeout",
        "memory": "error",
        "text": "error",
        "none": "error",
        "half": "error",
        "read": "correct",
        "number": "correct",
        "longer": "correct",
    }
    with RewardPool(workers=2, reward="grader:moods", cpu_seconds=0.5) as pool:
        verdicts = dict(zip(moods, pool.grade([(mood, "", False) for mood in moods]), strict=True))
    assert {mood: verdict.status for mood, verdict in verdicts.items()} == moods
    assert verdicts["raise"].reason == "RuntimeError: no idea"
    assert verdicts["memory"].reason == "out of memory"
    assert verdicts["half"].reason == "TypeError: the function returned 0.5, not True or False"


def test_a_function_that_stops_its_own_process_is_replaced(folder):
    with RewardPool(reward="grader:moods", wall_seconds=2.0) as pool:
        assert statuses(pool.grade([("stop", "", False), ("long", "", False)])) == ["error", "correct"]


def test_a_response_longer_than_a_pipe_travels_to_the_worker_and_one_over_a_megabyte_is_wrong(folder):
    with RewardPool(workers=2, reward="grader:ends_with") as pool:
        long = [("x" * 500_000 + str(i), str(i), False) for i in range(4)]
        assert statuses(pool.grade([*long, ("é" * 300_000 + "\ud800", "\ud800", False)])) == ["correct"] * 5
        assert statuses(pool.grade([("x" * 2_000_000, "x", False)])) == ["wrong"]


def config(name, **reward):
    values = {"model": {"path": "m"}, "data": {"train": "arithmetic"}, "reward": {"name": name, **reward}}
    return parse_config(values)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:grade", "reward.name=nowhere:grade: module nowhere can't be imported (ModuleNotFoundError"),
        ("broken:grade", "broken can't be imported (ModuleNotFoundError: No module named 'nowhere_to_be_found')"),
        ("leaving:grade", "leaving can't be imported (SystemExit: 2)"),
        ("dying:grade", "module dying can't be imported (the worker was killed by SIGSEGV)"),
        ("grader:grade", "grader.py) has no function grade"),
        ("grader:NUMBER", "grader.py) has no function NUMBER"),
        ("types:grade", "types.py) has no function grade"),  # Python's own
        ("grader:one_argument", "must be callable as one_argument(response, answer): too many positional arguments"),
        ("grader:later", "must not be async"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_one_line_before_the_run(folder, name, words):
    with pytest.raises(UserError) as refused:
        check_reward(config(name), "train", {})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_function_that_can_be_used_is_not_refused(folder):
    check_reward(config("grader:ends_with"), "train", {})
    check_reward(config("nowhere:grade"), "sft", {})  # has no reward


def test_unreadable_countdown_references_are_refused_before_the_run():
    problems = load_splits(config("countdown").data, "train")
    with pytest.raises(UserError, match=r"\(data.train\): a countdown reference is like '3, 5, 7, 8 = 24'"):
        check_reward(config("countdown"), "train", problems)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (
            {"name": "chess"},
            "reward.name='chess': there is math, countdown, format, or a function of yours",
        ),
        ({"name": "a b:c"}, "reward.name='a b:c': there is math"),
        (
            {"name": "countdown", "lenient": True},
            "reward.lenient=true is for reward.name=math, not for countdown",
        ),
        ({"memory_mib": 16}, "reward.memory_mib=16: should be greater than or equal to 512"),
        ({"recycle_after": 0}, "reward.recycle_after=0: should be greater than or equal to 1"),
    ],
)
def test_impossible_reward_settings_are_refused(reward, words):
    with pytest.raises(UserError) as refused:
        parse_config({"model": {"path": "m"}, "data": {"train": "arithmetic"}, "reward": reward})
    assert words in str(refused.value)


def test_the_default_reward_is_strict_math():
    assert RewardConfig().name == "math" and not RewardConfig().lenient


def test_files_beside_the_module_stand_in_for_nobodys_library_but_can_be_imported(folder):
    (folder / "queue.py").write_text("raise RuntimeError('shadowed')")
    (folder / "helper.py").write_text("def right(): return True")
    (folder / "pip.py").write_text(
        "from helper import right\nimport queue\n\ndef grade(response, answer): return right()"
    )
    with RewardPool(reward="pip:grade") as pool:  # and not the installed package of that name
        assert statuses(pool.grade([("a", "b", False)])) == ["correct"]
