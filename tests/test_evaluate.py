"""megarl eval through the command line: a real engine, the built-in model, a resumed and converted repetition."""

import json
import os
import resource
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megarl.config import load_config
from megarl.data import arithmetic
from megarl.data.prompts import load_prompts
from megarl.evaluate import find_model, results
from megarl.evaluation_folder import EvaluationFolder, check_continues
from megarl.preflight import check_run_folder
from megarl.types import RewardStatus, Sample, SampleGroup, UserError

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "megarl/data/base_model"
SUMS = [("3+4=", "7"), ("12+7=", "19"), ("5-9=", "-4"), ("2*8=", "16")]
N = 4


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [str(part) for part in (sys.executable, "-m", *arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def settings(folder, run_dir, **changes):
    values = {
        "model.path": MODEL,
        "data.eval": f"[math500={folder}/sums.jsonl, arithmetic]",
        "data.eval_limit": 10,
        "eval.samples_per_prompt": N,
        "eval.problems_per_batch": 4,
        "rollout.engines": 1,
        "run.dir": run_dir,
    }
    return [f"{key}={value}" for key, value in (values | changes).items()]


def evaluate(folder, run_dir, **changes):
    done = run("megarl.cli", "eval", "configs/quickstart.yaml", *settings(folder, run_dir, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The folder of an evaluation that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [{"problem": problem, "answer": answer} for problem, answer in SUMS]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, evaluate(folder, folder / "run")


@pytest.fixture(scope="module")
def resumed(evaluation):
    """One cut off within its third batch, going on with the same model from a run's checkpoint; what it printed."""
    folder, _ = evaluation
    checkpoint = folder / "trained/checkpoints/step_000007"
    done = run("tools.convert_checkpoint", "to-megatron", MODEL, checkpoint)
    assert done.returncode == 0, done.stderr
    (checkpoint / "state.json").write_text('{"step": 7}')
    (checkpoint.parent / "LATEST").write_text("step_000007\n")
    shutil.copytree(folder / "run", folder / "resumed")
    (folder / "resumed/eval.json").unlink()
    lines = (folder / "run/problems.jsonl").read_text().splitlines(keepends=True)
    (folder / "resumed/problems.jsonl").write_text("".join(lines[:9]) + lines[9][:50])
    return evaluate(folder, folder / "resumed", **{"model.path": folder / "trained"})


@pytest.fixture
def copied(evaluation, tmp_path):
    """A copy of the finished evaluation's folder, to go on from or to damage."""
    shutil.copytree(evaluation[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def config_of(evaluation, run_dir, **changes):
    return load_config(ROOT / "configs/quickstart.yaml", settings(evaluation[0], run_dir, **changes))


def prompts_of(config):
    return load_prompts(config.data, "eval", arithmetic.tokenizer()).prompts


def opened(config, prompts=None, model=MODEL):
    """How many problems are taken over."""
    with EvaluationFolder(config) as folder:
        folder.open(prompts_of(config) if prompts is None else prompts, model)
        return len(folder.rows)


def refusal(config, *arguments, **options):
    """Why the folder isn't gone on with; not a byte of it changes."""

    def files():
        return {path: path.read_bytes() for path in Path(config.run.dir).rglob("*") if path.is_file()}

    (Path(config.run.dir) / "lock").touch()
    before = files()
    with pytest.raises(UserError) as caught:
        opened(config, *arguments, **options)
    assert files() == before and "\n" not in str(caught.value)
    return str(caught.value)


def cut(folder, lines):
    path = folder / "problems.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    return path


def rows_of(folder):
    return [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]


def test_every_problem_is_written_with_its_samples(evaluation):
    rows = rows_of(evaluation[0] / "run")
    assert [row["set"] for row in rows] == ["math500"] * 4 + ["arithmetic"] * 10
    assert [(row["id"], row["problem"], row["answer"]) for row in rows[:4]] == [
        (f"math500:{i}", *sum_) for i, sum_ in enumerate(SUMS, 1)
    ]
    for row in rows:
        assert [sample["index"] for sample in row["samples"]] == list(range(N))
        assert row["correct"] == sum(sample["status"] == "correct" for sample in row["samples"])
        assert all(0 < sample["tokens"] <= 24 for sample in row["samples"])
    assert 0 < sum(row["correct"] for row in rows) < 14 * N


def test_the_numbers_are_those_of_the_samples(evaluation):
    folder, printed = evaluation
    report = json.loads((folder / "run/eval.json").read_text())
    for name in ("math500", "arithmetic"):
        right = [
            [sample["status"] == "correct" for sample in row["samples"]]
            for row in rows_of(folder / "run")
            if row["set"] == name
        ]
        numbers = report["sets"][name]
        assert numbers["problems"] == len(right)
        assert numbers[f"avg@{N}"]["value"] == pytest.approx(np.mean(right))
        for k in (2, N):
            subsets = [any(subset) for row in right for subset in combinations(row, k)]
            assert numbers[f"pass@{k}"]["value"] == pytest.approx(np.mean(subsets))
        for interval in (numbers[f"avg@{N}"]["over_problems"], numbers[f"avg@{N}"]["over_samples"]):
            assert 0 <= interval[0] <= numbers[f"avg@{N}"]["value"] <= interval[1] <= 1
    values = [report["sets"][name][f"avg@{N}"]["value"] for name in ("math500", "arithmetic", "mean")]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    for text in ("math500 (4)", "arithmetic (10)", "mean (14)", f"avg@{N}", f"pass@{N}", f"{values[2]:.3f}"):
        assert text in printed


def test_progress_says_how_far_it_is_and_what_is_left(evaluation):
    lines = [line for line in evaluation[1].splitlines() if "/14 problems" in line]
    assert [line.split()[0] for line in lines] == ["4/14", "8/14", "12/14", "14/14"]
    assert all(line.endswith("left") for line in lines)


def test_an_evaluation_that_was_cut_off_ends_as_if_nothing_had_happened(evaluation, resumed):
    folder, _ = evaluation
    assert "8 of 14 problems are in" in resumed
    assert (folder / "resumed/problems.jsonl").read_bytes() == (folder / "run/problems.jsonl").read_bytes()
    before, after = (json.loads((folder / name / "eval.json").read_text()) for name in ("run", "resumed"))
    assert before.pop("model") == str(MODEL)
    assert after.pop("model") == f"{folder}/trained/checkpoints/step_000007"
    assert before == after


def test_a_checkpoint_is_converted_for_as_long_as_it_takes(evaluation, resumed):
    folder, _ = evaluation
    assert f"converting {folder}/trained/checkpoints/step_000007 to the Hugging Face format" in resumed
    assert not (folder / "resumed/converted").exists()


def test_a_finished_evaluation_is_shown_again_without_an_engine(evaluation):
    folder, printed = evaluation
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(folder / "again/logs")
    again = evaluate(folder, folder / "again")
    assert not (folder / "again/logs").exists()
    assert again.split("│")[1:-1] == printed.split("│")[1:-1]


@pytest.mark.parametrize(
    "change",
    [
        {"eval.temperature": "0.5"},
        {"eval.samples_per_prompt": "5"},
        {"eval.problems_per_batch": "5"},
        {"run.seed": "1"},
        {"data.eval_limit": "9"},
        {"data.prompt_template": "'{problem} '"},
        {"rollout.max_response_tokens": "20"},
        {"reward.cpu_seconds": "1.0"},
    ],
)
def test_what_the_numbers_depend_on_stays_or_is_named(evaluation, change):
    folder, _ = evaluation
    config = load_config(ROOT / "configs/quickstart.yaml", settings(folder, folder / "run", **change))
    with pytest.raises(UserError, match=f"{next(iter(change))}=.* but the evaluation in run.dir=.* has"):
        check_continues(config)


@pytest.mark.parametrize(
    "change", [{"optim.lr": "1.0"}, {"recipe": "grpo"}, {"reward.workers": "2"}, {"model.path": "moved"}, {}]
)
def test_what_they_do_not_depend_on_may_change(evaluation, change):
    folder, _ = evaluation
    check_continues(load_config(ROOT / "configs/quickstart.yaml", settings(folder, folder / "run", **change)))


def test_other_problems_under_the_same_name_are_noticed(evaluation):
    folder, _ = evaluation
    shutil.copytree(folder / "run", folder / "other")
    other = folder / "other_sums.jsonl"
    other.write_text((folder / "sums.jsonl").read_text().replace("12+7=", "12+8="))
    config = folder / "other/config.yaml"
    config.write_text(config.read_text().replace("sums.jsonl", "other_sums.jsonl"))
    done = run(
        "megarl.cli",
        "eval",
        "configs/quickstart.yaml",
        *settings(folder, folder / "other", **{"data.eval": f"[math500={other}, arithmetic]"}),
    )
    assert done.returncode == 2
    assert (
        "problems.jsonl:2 is problem math500:2, but data.eval has math500:2 there, or another text or answer"
        in done.stderr
    )


@pytest.mark.parametrize("done", [14, 10, 5])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda prompts: prompts[:2] + prompts[4:], "problems.jsonl:3 is problem math500:3, but data.eval has arithm"),
        (lambda prompts: prompts[:5], "data.eval/arithmetic='1 problems, sha256 "),
        (lambda prompts: prompts + prompts[-1:], "data.eval/arithmetic='11 problems, sha256 "),
        (lambda prompts: prompts[::-1], "problems.jsonl:1 is problem math500:1, but data.eval has arithmetic/9 there"),
        (lambda prompts: prompts[:4], "data.eval/arithmetic=None, but the evaluation in run.dir="),
    ],
)
def test_shrunk_grown_and_reordered_data_is_refused_and_no_row_is_lost(evaluation, copied, done, change, words):
    cut(copied, done)
    config = config_of(evaluation, copied)
    assert words in refusal(config, change(prompts_of(config)))


DAMAGED = "is damaged ("


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", DAMAGED + "Invalid JSON"),
        (b'{"set": "math500", "id"', DAMAGED + "Invalid JSON"),
        (b"\xff\xfe", DAMAGED + "Invalid JSON"),
        (b"\0" * 50, DAMAGED + "Invalid JSON"),
        (b"[" * 100_000, DAMAGED + "Invalid JSON"),
        (b"[]", DAMAGED),
        (b"{}", DAMAGED + "set: Field required)"),
        ({"id": 7}, DAMAGED + "id: Input should be a valid string)"),
        ({"correct": "1"}, DAMAGED + "correct: Input should be a valid integer)"),
        ({"samples": None}, DAMAGED + "samples: Input should be a valid array)"),
        ({"samples": []}, DAMAGED + "0 samples, 0 of them right)"),
        ({"correct": 99}, DAMAGED + "4 samples,"),
        ({"more": 1}, DAMAGED + "more: Extra inputs are not permitted)"),
        ({"answer": "other"}, "is problem arithmetic/2, but data.eval has arithmetic/2 there, or another text or"),
    ],
)
def test_a_damaged_row_is_refused_by_file_and_line(evaluation, copied, line, words):
    path = cut(copied, 10)
    lines = path.read_bytes().splitlines()
    lines[6] = line if isinstance(line, bytes) else json.dumps(json.loads(lines[6]) | line).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    message = refusal(config_of(evaluation, copied))
    assert f"{path}:7 {words}" in message and message.endswith("name another run.dir")


@pytest.mark.parametrize("name", ["inputs.json", "versions.json", "config.yaml"])
@pytest.mark.parametrize("content", [None, "", "{torn", "[]"])
def test_rows_without_a_readable_record_of_what_they_were_made_from_are_refused(evaluation, copied, name, content):
    cut(copied, 10)
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    message = refusal(config_of(evaluation, copied))
    assert str(copied / name) in message and message.endswith(("name another run.dir", "name another"))


def test_a_line_that_was_torn_off_is_done_again_without_a_word(evaluation, copied):
    path = cut(copied, 9)
    for torn in (b'{"set": "arith', b"\0\0\0", path.read_bytes().splitlines()[-1]):
        with path.open("ab") as file:
            file.write(torn)
        assert opened(config_of(evaluation, copied)) == 8
    path.write_bytes(b'{"set": "ma')
    assert opened(config_of(evaluation, copied, **{"run.seed": 1})) == 0, "nothing is there to go on behind"


def test_a_second_evaluation_in_the_same_folder_is_refused(evaluation, copied):
    config = config_of(evaluation, copied)
    with EvaluationFolder(config):
        assert f"run.dir={copied}: an evaluation is running there; wait for it" in refusal(config)
    assert opened(config) == 14


def test_the_lock_goes_with_its_holder_and_stays_with_a_child_that_inherits_it(evaluation, copied):
    config = config_of(evaluation, copied)
    with EvaluationFolder(config) as folder:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[folder.lock])
    assert "an evaluation is running there" in refusal(config)
    child.kill()
    child.wait()
    assert opened(config) == 14


def test_a_model_may_lie_elsewhere_but_not_have_other_weights_or_another_tokenizer(evaluation, copied, tmp_path):
    cut(copied, 8)
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = config_of(evaluation, copied, **{"model.path": model})
    (model / "README.md").write_text("no part of the model")
    assert opened(config, model=model) == 8
    for name, position in (("model.safetensors", -1), ("tokenizer.json", 200), ("config.json", -2)):
        content = bytearray((model / name).read_bytes())
        content[position] ^= 1
        (model / name).write_bytes(content)
        message = refusal(config, model=model)
        assert f"model.path/{name}='sha256 " in message and message.endswith("keep it, or name another folder")
        shutil.copy(MODEL / name, model / name)
    (model / "chat_template.jinja").write_text("")
    assert "model.path/chat_template.jinja='sha256 " in refusal(config, model=model)


def test_another_version_of_a_reward_function_is_noticed(evaluation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(evaluation, tmp_path / "run", **{"reward.name": "rewards.mine:check"})
    (tmp_path / "rewards").mkdir()
    code = tmp_path / "rewards/mine.py"
    code.write_text("def check(response, answer): return True")
    assert opened(config) == 0
    shutil.copy(evaluation[0] / "run/problems.jsonl", tmp_path / "run")
    assert opened(config) == 14
    code.write_text("def check(response, answer): return False")
    assert "reward.name/rewards/mine.py='sha256 " in refusal(config)


def test_other_packages_show_a_finished_evaluation_but_do_not_go_on_with_one(evaluation, copied):
    versions = json.loads((copied / "versions.json").read_text())
    (copied / "versions.json").write_text(json.dumps(versions | {"math-verify": "0.0.1"}))
    config = config_of(evaluation, copied)
    assert opened(config) == 14
    cut(copied, 8)
    assert "but the evaluation in run.dir=" in (message := refusal(config)) and message.startswith("math-verify=")


def test_a_batch_replaces_what_a_crash_left_and_a_full_disk_loses_nothing(evaluation, copied):
    config = config_of(evaluation, copied)
    whole = (copied / "problems.jsonl").read_bytes()
    rows = rows_of(copied)
    groups = [
        SampleGroup(
            prompt,
            [
                Sample(
                    saved["index"],
                    np.zeros(saved["tokens"], np.int32),
                    np.zeros(saved["tokens"], np.float32),
                    saved["response"],
                    saved["finish_reason"],
                    np.zeros(saved["tokens"], np.int32),
                    RewardStatus(saved["status"]),
                    saved["extracted"],
                )
                for saved in row["samples"]
            ],
        )
        for prompt, row in zip(prompts_of(config), rows, strict=True)
    ]
    path = cut(copied, 9)
    with EvaluationFolder(config) as folder:
        folder.open(prompts_of(config), MODEL)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(path.read_bytes()) - 10, unlimited[1]))
        try:
            with pytest.raises(
                UserError, match=r"problems.jsonl can't be written: File too large; see to it, then run"
            ):
                folder.append(groups[8:12])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert whole.startswith(b"".join(path.read_bytes().splitlines(keepends=True)[:8]))
    with EvaluationFolder(config) as folder:
        folder.open(prompts_of(config), MODEL)
        assert len(folder.rows) == 8
        folder.append(groups[8:12])
        folder.append(groups[12:])
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(evaluation):
    with pytest.raises(UserError, match="^/proc/megarl can't be written: "):
        opened(config_of(evaluation, "/proc/megarl"))


def test_a_folder_with_a_training_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="already holds a run; name another folder"):
        check_continues(load_config(ROOT / "configs/quickstart.yaml", [f"run.dir={tmp_path}"]))


def test_training_into_the_folder_of_an_evaluation_is_refused(evaluation):
    folder, _ = evaluation
    with pytest.raises(UserError, match="already holds an evaluation; name another folder"):
        check_run_folder(load_config(ROOT / "configs/quickstart.yaml", [f"run.dir={folder}/run"]), "train", False)


def test_samples_without_a_verdict_are_counted_beside_the_numbers():
    rows = [
        {"set": "s", "correct": 1, "samples": [{"status": status, "tokens": 3} for status in statuses]}
        for statuses in (("correct", "timeout"), ("correct", "wrong"))
    ]
    estimates, details = results(rows, 2)["s"]
    assert estimates["avg@2"].value == 0.5
    assert (details["timeout"], details["error"], details["wrong"]) == (1, 0, 1)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone/away/model", "model.path=gone/away/model is not a folder; expected a Hugging Face model folder or a"),
        (
            "nobody/no-such-model",
            "model.path=nobody/no-such-model: neither a folder nor a model that could be",
        ),
        (str(ROOT / "docs"), "holds neither a Megatron checkpoint"),
    ],
)
def test_what_is_no_model_is_refused(monkeypatch, path, words):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        find_model(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_evaluation_needs_room_for_its_own_responses_alone(evaluation, tmp_path):
    """The model has 128 positions; rollout.max_response_tokens would not fit."""
    changes = {"rollout.max_response_tokens": 9999, "eval.max_response_tokens": 24, "data.eval_limit": 2}
    evaluate(evaluation[0], tmp_path / "run", **changes | {"learner.micro_batch_tokens": 20000})
    assert all(sample["tokens"] <= 24 for row in rows_of(tmp_path / "run") for sample in row["samples"])
