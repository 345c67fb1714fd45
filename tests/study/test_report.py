"""The report: true to the runs it is made from, honest about what is missing."""

import json

import numpy as np
import pytest
from folders import finish, write_config

from megarl.study.config import load_study
from megarl.study.report import write_report
from megarl.study.results import read_results

pytestmark = pytest.mark.slow

SKILLS = {"raft": 0.2, "raft_pp": 0.8, "grpo": 0.5}


@pytest.fixture
def study(tmp_path):
    """Nine rows, of which the last one has not finished."""
    study = load_study(write_config(tmp_path))
    for row in study.rows[:-1]:
        finish(row, SKILLS[row.recipe], entropy=0.1 * (row.seed + 1))
    return study


def test_results_are_the_runs_own_numbers(study):
    results = read_results(study)
    assert results.scores("avg", "raft_pp").shape == (3, 40)
    assert results.scores("avg", "raft_pp").mean() == pytest.approx(0.8)
    assert results.scores("early", "raft_pp").mean() == pytest.approx(0.2)  # step 2 of 8
    assert np.allclose(results.scores("entropy", "raft"), [[0.1], [0.2], [0.3]])
    assert results.scores("samples_kept", "grpo").tolist() == [[64.0], [64.0]]
    assert results.scores("seconds", "grpo").tolist() == [[16.0], [16.0]]


def test_the_report_states_results_claims_and_how_they_were_measured(study):
    text = write_report(read_results(study)).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows[:3]] == ["raft_pp", "grpo", "raft"]  # the best first
    assert "| `raft_pp` | 3 | 0.800 [" in text and "| `grpo` | 2 | 0.500 [" in text
    (claim,) = [line for line in text.splitlines() if line.startswith("| RAFT++ is better than RAFT ")]
    assert "+0.600 [" in claim and claim.endswith("| supports |")
    assert "**Incomplete:** 1 of 9 rows have not finished: grpo seed 2." in text
    for words in ("One small task (`arithmetic`)", "0.3M parameters", "Seeds 0, 1, 2", "40 problems", "not corrected"):
        assert words in text
    assert "not measured" in text and "is step 2." in text


def test_all_numbers_are_in_the_json_and_writing_again_changes_nothing(study):
    folder = study.folder
    write_report(read_results(study))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    results = json.loads((folder / "results.json").read_text())
    assert results["recipes"]["raft"]["avg"]["mean"] == pytest.approx(0.2)
    assert [row["step"] for row in results["runs"]["raft_pp"]["2"]] == [0, 2, 4, 6, 8]
    assert results["runs"]["raft_pp"]["2"][-1]["eval/avg@4"] == pytest.approx(0.8)
    assert {claim["verdict"] for claim in results["claims"]} >= {"supports", "not measured"}
    write_report(read_results(study))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_every_quantity_is_plotted_against_steps_and_samples(study):
    text = write_report(read_results(study)).read_text()
    plots = sorted(path.name for path in (study.folder / "plots").iterdir())
    assert plots == [f"{name}.png" for name in ("all_correct", "all_wrong", "avg", "entropy", "kl", "mixed", "reward")]
    assert all(f"(plots/{name})" in text for name in plots)


def test_what_was_not_measured_is_left_out(study):
    for row in study.rows[:-1]:
        file = row.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if "kl" not in key} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = write_report(read_results(study)).read_text()
    assert not (study.folder / "plots/kl.png").exists() and "| – |" in text


def test_the_report_says_what_entropy_was_measured_on(study):
    assert "samples of the first 40 held-out problems alone" in write_report(read_results(study)).read_text()
    for row in study.rows[:-1]:
        file = row.folder / "metrics.jsonl"
        file.write_text(file.read_text().replace("eval/entropy", "eval/other"))
    assert "held-out problems alone" not in write_report(read_results(study)).read_text()


def test_the_report_says_what_was_set_otherwise_for_a_recipe(tmp_path, study):
    text = write_report(read_results(study)).read_text()
    assert "4 prompts x 4 samples" in text and "So for all recipes." in text
    changes = [
        "optim.lr=0.5",
        "study.overrides={grpo: {schedule.epochs: 2, recipe.clip_high: 0.3}, raft: {optim.lr: 2.0}}",
    ]
    other = load_study(write_config(tmp_path / "other"), overrides=changes)
    for row in other.rows:
        finish(row, 0.5)
    text = write_report(read_results(other)).read_text()
    assert "learning rate 0.5" in text and "So for all recipes." not in text
    assert "of some recipes: `raft`: optim.lr=2.0; `grpo`: schedule.epochs=2, recipe.clip_high=0.3." in text
