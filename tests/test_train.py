"""The main job through the command line: real ranks, a real engine, the built-in model and task."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
SETTINGS = [
    "schedule.prompts_per_step=16",
    "schedule.samples_per_prompt=4",
    "schedule.minibatch_prompts=8",
    "data.eval_limit=16",
    "rollout.max_sequences=128",
    "recipe=grpo",
]


ONE_RANK = ["learner.world_size=1", "learner.tensor_model_parallel_size=1"]  # half the processes


def command(folder: Path, *arguments: str) -> list[str]:
    config = str(ROOT / "configs/quickstart.yaml")
    return [sys.executable, "-m", "megarl.cli", "train", config, f"run.dir={folder}", *SETTINGS, *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(folder: Path) -> dict[int, dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows), "a step was recorded twice"
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(folder, "run.steps=4", "run.checkpoint_every=2")
    return folder


def test_every_step_agrees_with_the_engine_and_is_recorded(uninterrupted):
    rows = metrics(uninterrupted)
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert rows[0]["eval/mismatch/mean"] < 1e-3 and rows[4]["eval/mismatch/mean"] < 1e-3
    for step in range(1, 5):
        assert rows[step]["mismatch/mean"] < 1e-3
        assert rows[step]["updates/count"] == 2
        samples = [json.loads(x) for x in (uninterrupted / f"samples/step_{step:06d}.jsonl").read_text().splitlines()]
        assert len(samples) == 64 and all(s["weight_versions"] == [step - 1] * 2 for s in samples)
    times = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])
    for phase in ("rollout", "grading", "annotate", "update", "weight_sync", "checkpoint"):
        assert times[f"time/{phase}"] > 0
    held = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()[1:]]
    for processes in ("ranks", "engines"):  # after each step as after the first two
        gib = [row[f"memory/{processes}"] for row in held]
        assert 0.1 < gib[-1] < 1.05 * max(gib[:2]), (processes, gib)
    assert {"config.yaml", "versions.json", "tensorboard", "hf", "checkpoints"} <= {
        p.name for p in uninterrupted.iterdir()
    }


def test_a_killed_run_resumes_to_the_uninterrupted_one(uninterrupted, tmp_path):
    killed = subprocess.run(
        command(tmp_path, "run.steps=4", "run.checkpoint_every=2"),
        env={**os.environ, "MEGARL_FAILPOINT": "rank 1 update 4"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    output = killed.stdout
    assert killed.returncode == 1
    assert "rank 1 was killed by SIGKILL" in output and "--resume" in output, output
    assert "Traceback" not in output
    assert (tmp_path / "checkpoints/LATEST").read_text().strip() == "step_000002"

    (tmp_path / "checkpoints/LATEST").unlink()  # the newest complete one is found without
    output = run(tmp_path, "run.steps=4", "run.checkpoint_every=2", "learner.offload=all", "--resume").stdout
    assert "resuming from" in output and f"beyond step 2 is in {tmp_path / 'history/001'}" in output
    assert (tmp_path / "history/001/samples/step_000003.jsonl").exists()
    assert metrics(tmp_path) == metrics(uninterrupted)
    resumed, expected = (load_file(folder / "hf/model.safetensors") for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_without_a_learning_rate_nothing_improves_and_a_stop_file_saves_and_ends(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "STOP").touch()
    output = run(tmp_path, "run.steps=3", "optim.lr=0", "run.evaluate_every=1", *ONE_RANK).stdout
    rows = metrics(tmp_path)
    assert sorted(rows) == [0, 1] and "go on with --resume" in output
    assert (tmp_path / "checkpoints/LATEST").read_text().strip() == "step_000001"
    before, after = ({k: v for k, v in row.items() if k.startswith("eval/")} for row in (rows[0], rows[1]))
    assert before == after and rows[1]["updates/count"] == 2


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        (
            "ppo",
            ["critic.head_start_steps=1", "recipe.mismatch=seq_tis", "learner.offload=optimizer"],
            {"updates/count": 2},
        ),
        ("iterative_dpo", ["schedule.epochs=2", *ONE_RANK], {"updates/count": 2}),
        ("dapo", ONE_RANK, {"updates/count": 2}),
        ("remax", ONE_RANK, {"samples/generated": 64 + 16}),
        ("reinforce_ada", ONE_RANK, {"samples/kept": 64}),
    ],
)
def test_critics_pairs_and_every_way_of_sampling_run_through_the_same_loop(tmp_path, recipe, settings, expected):
    run(tmp_path, f"recipe={recipe}", "run.steps=2", "run.export=false", "run.track_kl=true", *settings)
    rows = metrics(tmp_path)
    assert sorted(rows) == [0, 1, 2]
    assert rows[0]["eval/kl_k1"] == pytest.approx(0, abs=1e-5) and rows[2]["eval/kl_k3"] > 1e-7
    for step in (1, 2):
        assert {name: rows[step][name] for name in expected} == expected
        assert rows[step]["mismatch/mean"] < 1e-3
    samples = [json.loads(line) for line in (tmp_path / "samples/step_000001.jsonl").read_text().splitlines()]
    if recipe == "dapo":  # all-correct and all-wrong prompts were replaced by others
        assert rows[1]["samples/generated"] > 64 >= rows[1]["samples/kept"]
        assert len({sample["prompt_id"] for sample in samples}) == rows[1]["samples/generated"] / 4
    if recipe == "reinforce_ada":  # prompts without two right and two wrong were sampled on
        assert rows[1]["samples/generated"] == len(samples) > 64
    if recipe == "iterative_dpo":  # at most 8 of the 16 prompts have a pair: one mini-batch a pass
        assert all(0 < rows[step]["samples/kept"] <= 16 for step in (1, 2))
    if recipe == "ppo":
        assert rows[1]["optim/lr"] == 0 and rows[2]["optim/lr"] > 0
        assert rows[2]["critic/value_grad_norm"] > 0 and rows[1]["mismatch/correction"] == pytest.approx(1, abs=1e-3)


def test_steps_that_the_recipe_filters_away_entirely_move_nothing_and_are_logged(tmp_path):
    cold = ["rollout.temperature=0.01", "recipe=reinforce_rej", "optim.weight_decay=0.5"]  # no mixed groups
    run(tmp_path, "run.steps=2", "data.eval=null", *ONE_RANK, *cold)
    rows = metrics(tmp_path)
    assert [(rows[step]["samples/kept"], rows[step]["updates/skipped"]) for step in (1, 2)] == [(0, 1)] * 2
    trained, start = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", ROOT / "megarl/data/base_model"))
    assert all(torch.equal(trained[name], start[name]) for name in start)
