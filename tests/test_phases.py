import subprocess
import sys
import threading

import pytest

from megarl import phases
from megarl.phases import Phase, Watch, phase


@pytest.fixture
def clock(monkeypatch):
    """clock(s): so many seconds pass."""
    now = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_a_phase_knows_how_long_it_took_also_where_it_fails(clock):
    with pytest.raises(KeyError), phase("grading") as running:
        clock(2.5)
        raise KeyError
    clock(1)
    assert running.seconds == 2.5


def test_words_come_where_a_phase_does_not_get_on_and_then_after_double_the_time(clock):
    running = Phase("rollout", total=64)
    said = []
    for second in range(1, 401):
        clock(1)
        if second == 100:
            running.advance(45)
        if words := running.words():
            said.append((second, words))
    assert said == [
        (60, "waiting 60 s for rollout: 0 of 64 done"),
        (160, "waiting 60 s for rollout: 45 of 64 done"),
        (220, "waiting 120 s for rollout: 45 of 64 done"),
        (340, "waiting 240 s for rollout: 45 of 64 done"),
    ]


def test_a_watch_says_what_is_running_and_only_that(monkeypatch):
    monkeypatch.setattr(phases, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(phases, "FIRST_WORDS_SECONDS", 0.02)
    said, enough = [], threading.Event()

    def say(words):
        said.append(words)
        if any("update" in words for words in said):
            enough.set()

    watch = Watch(say)
    with phase("over"):
        pass
    with phase("update"):
        assert enough.wait(60)
    watch.close()
    assert {words.split(" for ")[1] for words in said} == {"update"}


@pytest.mark.processes
def test_a_failpoint_kills_the_process_that_it_names_and_no_other():
    code = "from megarl.phases import phase\nfor i in range(3):\n    with phase('update'): print(i, flush=True)\n"

    def run(**environment):
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    killed = run(MEGARL_FAILPOINT="rank 9 update 1,rank 1 update 3", RANK="1")
    assert killed.returncode == -9 and killed.stdout.split() == ["0", "1"]
    assert run(MEGARL_FAILPOINT="rank 1 update 3", RANK="0").returncode == 0
    engine = {"MEGARL_PROCESS": "engine 0.1", "RANK": "1"}
    assert run(MEGARL_FAILPOINT="rank 1 update 1", **engine).returncode == 0
    assert run(MEGARL_FAILPOINT="engine 0.1 update 2", **engine).stdout.split() == ["0"]
