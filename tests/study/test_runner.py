"""Running a study: what is skipped, gone on with, recorded and refused; one small real study end to end."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import finish, write_config
from rich.console import Console

from megarl.resume import run_folder
from megarl.study.config import load_study
from megarl.study.runner import Progress, is_finished, last_step, read_outcome, run_study
from megarl.types import UserError

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return [sys.executable, "-m", "megarl.cli", "study", *map(str, arguments)]


def study_command(*arguments):
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_finished_rows_are_skipped_and_a_finished_study_runs_nothing(tmp_path, capsys):
    study = load_study(write_config(tmp_path))
    for row in study.rows:
        finish(row, 0.5)
    assert run_study(study) == []
    assert "9 rows" in (out := capsys.readouterr().out) and "9 finished before" in out


def test_a_study_that_is_running_is_not_started_twice(tmp_path):
    study = load_study(write_config(tmp_path))
    study.folder.mkdir()
    with (study.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a study is running there"):
            run_study(study)
    assert not study.rows[0].folder.exists()


@pytest.mark.processes
def test_what_no_row_could_start_with_is_refused_before_anything_is_written(tmp_path):
    done = study_command(write_config(tmp_path, model="/nowhere"))
    assert done.returncode == 2 and "model.path=/nowhere" in done.stderr and not (tmp_path / "study").exists()


def test_a_row_that_could_not_start_is_named_before_any_starts(tmp_path, capsys):
    study = load_study(
        write_config(tmp_path), overrides=["study.overrides={grpo: {schedule.prompts_per_step: 10000000}}"]
    )
    with pytest.raises(UserError, match="grpo seed 0: schedule.prompts_per_step=10000000 is more than"):
        run_study(study)
    assert not study.folder.exists()


def test_rows_are_not_gone_on_with_from_another_model_than_the_finished_ones_had(tmp_path):
    model = shutil.copytree(ROOT / "megarl/data/base_model", tmp_path / "model")
    study = load_study(write_config(tmp_path, model=model))
    finish(study.rows[1], 0.5)
    with run_folder(study.rows[1].config, "train", resume=True):
        pass
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="^raft_pp seed 0: model.path/model.safetensors has changed since "):
        run_study(study)


def test_a_line_of_metrics_that_is_being_written_does_not_count(tmp_path):
    row = load_study(write_config(tmp_path)).rows[0]
    row.folder.mkdir(parents=True)
    assert last_step(row) == 0
    (row.folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert last_step(row) == 1


@pytest.mark.parametrize("text", ["", '{"finished": tr', "4", '{"finished": true}'])
def test_a_record_that_cannot_be_read_is_of_an_unfinished_row(tmp_path, text):
    row = load_study(write_config(tmp_path)).rows[0]
    finish(row, 0.5)
    assert is_finished(row)
    (row.folder / "row.json").write_text(text)
    assert not is_finished(row)


def test_time_left_comes_from_finished_rows_and_from_the_running_one(tmp_path):
    study = load_study(write_config(tmp_path))
    console = Console()
    assert Progress(study, study.rows, console).times() == "used 0 s, left ?"
    assert Progress(study, study.rows, console).times(10, 0.5) == "used 10 s, left about 3 min"  # 10 + 8 x 20 s
    finish(study.rows[0], 0.5)  # it took a minute
    rest = Progress(study, study.rows[1:], console)
    assert rest.times() == "used 60 s, left about 8 min"
    assert rest.times(running=30, fraction=0.25) == "used 90 s, left about 8 min".replace("90 s", "2 min")
    assert rest.count(study.rows[4]) == "row 5/9"


@pytest.mark.processes
def test_the_report_alone_needs_a_finished_row(tmp_path):
    done = study_command(write_config(tmp_path), "--report")
    assert done.returncode == 2 and "no row has finished yet" in done.stderr


@pytest.mark.processes
@pytest.mark.full
def test_a_small_study_end_to_end(tmp_path):
    """Interrupted in its first row, gone on with, one row failing, reported."""
    arguments = ("configs/study_minimal.yaml", "--scale", "smoke", f"study.dir={tmp_path}", "study.seeds=[0]")
    arguments += ("run.steps=12", "run.checkpoint_every=3", "run.evaluate_every=6", "data.eval_limit=16")
    arguments += ("study.recipes=[raft_pp, grpo, reinforce_rej]",)
    arguments += ("study.overrides={grpo: {rollout.max_logprob_difference: 1e-30}}",)  # no engine agrees so well

    first = tmp_path / "raft_pp/seed_0"
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    deadline = time.monotonic() + 240
    while not (first / "checkpoints/LATEST").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output
    row = load_study(arguments[0], "smoke", list(arguments[3:])).rows[0]
    assert row.folder == first and read_outcome(row).error == "interrupted" and last_step(row) < 12

    done = study_command(*arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"3 rows in {tmp_path}"
    assert lines[1].startswith("row 1/3  raft_pp seed 0  finished  avg@4 0.") and "left" in lines[1]
    assert lines[2].startswith("row 2/3  grpo seed 0  failed: ") and "max_logprob_difference" in lines[2]
    assert lines[3].startswith("row 3/3  reinforce_rej seed 0  finished")
    assert "resuming from" in (first / "train.log").read_text()
    steps = [json.loads(line)["step"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(13))
    assert "grpo seed 0: " in done.stderr and "1 of 3 rows failed; run the same" in done.stderr

    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["recipes"]) == {"raft_pp", "reinforce_rej"} and results["unfinished"] == ["grpo seed 0"]
    assert {"avg", "pass", "entropy", "kl", "kl_sequence", "samples_kept"} <= set(results["recipes"]["raft_pp"])
    assert "**Incomplete:** 1 of 3 rows" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "plots/kl.png").stat().st_size > 1000

    changed = study_command(*arguments, "optim.lr=0.5")
    assert changed.returncode == 2 and "optim.lr=0.5, but" in changed.stderr
