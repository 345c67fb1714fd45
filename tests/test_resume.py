"""Where a run may begin or go on: which keys may change, what was read, what is set aside, who holds the folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.config import Config, dump_config, load_config
from megarl.data.prompts import load_splits
from megarl.evaluation_folder import check_continues
from megarl.preflight import check_run_folder
from megarl.resume import CHANGEABLE, check_inputs, differing, held_by, run_folder, set_aside
from megarl.study.config import load_study
from megarl.types import UserError

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "megarl/data/base_model"
CONFIG = """\
run: {{dir: {folder}/run, steps: 8}}
model: {{path: {folder}/model}}
data: {{train: {folder}/rows.jsonl, eval: [arithmetic, mine={folder}/held_out.jsonl], eval_limit: 4}}
reward: {{name: "grading.mine:check"}}
schedule: {{prompts_per_step: 2, samples_per_prompt: 2}}
"""
ROWS = "".join(f'{{"question": "{i}+2=", "answer": "{i + 2}"}}\n' for i in range(9))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, tmp_path / "model")
    for name in ("rows.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(ROWS)
    (tmp_path / "grading").mkdir()
    check = "import json, torch\ndef check(response, answer):\n    from .rules import right\n    return True\n"
    (tmp_path / "grading/mine.py").write_text(check)
    (tmp_path / "grading/rules.py").write_text("from units import table as known, mine\nright = known\n")
    (tmp_path / "units").mkdir()
    (tmp_path / "units/__init__.py").write_text("from grading import mine\n")
    (tmp_path / "units/table.py").write_text("known = 1\n")
    (tmp_path / "other.py").write_text("nothing = 1\n")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def load(project, *overrides):
    return load_config(project / "config.yaml", list(overrides))


def begin(project, *overrides, command="train", steps=4):
    """The folder of a run as its first `steps` steps leave it, a checkpoint every second step."""
    config = load(project, *overrides)
    folder = Path(config.run.dir)
    with run_folder(config, command, resume=False):
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "samples").mkdir()
        rows = []
        for step in range(steps + 1):
            rows.append(json.dumps({"step": step}) + "\n")
            (folder / f"samples/{'step' if step else 'eval'}_{step:06d}.jsonl").write_text(f"of {step}")
            if step and step % 2 == 0:
                checkpoint = folder / f"checkpoints/step_{step:06d}"
                checkpoint.mkdir(parents=True)
                (checkpoint / "metadata.json").write_text("{}")
                (checkpoint / "state.json").write_text(json.dumps({"step": step}))
                (checkpoint.parent / "LATEST").write_text(checkpoint.name + "\n")
        (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


def refusal(config, resume=True, command="train"):
    with pytest.raises(UserError) as refused:
        check_run_folder(config, command, resume)
        check_inputs(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def other(value, annotation):
    """A value of the same type that differs."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value / 2 if value else 0.25 if isinstance(value, float) else 1
        case None:
            return "x" if "str" in str(annotation) else 3
        case _:
            return f"{value}x" if isinstance(value, str) else None


def test_every_key_but_the_few_that_may_change_is_refused_by_name(project):
    """On the config's own values, so that a new key is refused until somebody lists it."""
    before = load(project)
    for section, field in Config.model_fields.items():
        for key, declared in getattr(field.annotation, "model_fields", {}).items():
            values = getattr(before, section)
            changed = values.model_copy(update={key: other(getattr(values, key), declared.annotation)})
            differs = differing(before.model_copy(update={section: changed}), before, CHANGEABLE)
            name = f"{section}.{key}"
            assert [found[0] for found in differs] == ([] if name in CHANGEABLE else [name])
    models = {section: field.annotation for section, field in Config.model_fields.items()}
    sections = {section: getattr(model, "model_fields", {}) for section, model in models.items()}
    known = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    assert set(CHANGEABLE) <= known


@pytest.mark.parametrize(
    "change",
    ["reward.cpu_seconds=9.0", "reward.memory_mib=4096", "learner.fp32_logits=false", "run.track_kl=true", "run.seed=7"]
    + [
        "optim.lr=9.0",
        "recipe.clip_high=0.5",
        "eval.samples_per_prompt=2",
        "data.prompt_key=answer",
        "model.precision=bf16",
    ],
)
def test_what_makes_another_experiment_is_refused(project, change):
    begin(project)
    message = refusal(load(project, change))
    assert message.startswith(change.partition("=")[0] + "=") and message.endswith("keep it, or start another run")


def test_lenience_and_another_reward_are_refused(project):
    begin(project, "reward.name=math")
    assert refusal(load(project, "reward.name=math", "reward.lenient=true")).startswith("reward.lenient=True, but")
    assert refusal(load(project, "reward.name=format")).startswith(
        "reward.name='format', but the run to resume has 'math'"
    )


def test_layout_length_and_cadence_may_change(project):
    begin(project)
    changes = [
        "learner.tensor_model_parallel_size=2",
        "learner.packing=false",
        "learner.recompute=full",
        "run.steps=99",
    ]
    changes += ["run.checkpoint_every=1", "rollout.engines=2", "reward.workers=2", "run.keep_checkpoints=1"]
    check_run_folder(load(project, *changes), "train", resume=True)
    check_inputs(load(project, *changes))


def test_the_length_may_not_change_under_a_schedule_that_depends_on_it_nor_below_what_is_done(project):
    folder = begin(project, "optim.lr_schedule=cosine")
    message = refusal(load(project, "optim.lr_schedule=cosine", "run.steps=9"))
    assert message.startswith("run.steps=9, but the run to resume has 8, over which its optim.lr_schedule=cosine falls")
    shutil.rmtree(folder)
    begin(project)
    assert refusal(load(project, "run.steps=3")).startswith("run.steps=3, but ")
    check_run_folder(load(project, "run.steps=4"), "train", resume=True)


def rewrite(name, old, new):
    def change(project):
        path = project / name
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return change


def flip(name, position):
    def change(project):
        content = bytearray((project / name).read_bytes())
        content[position] ^= 1
        (project / name).write_bytes(content)

    return change


CHANGED = {
    "data.train/rows.jsonl has changed": rewrite("rows.jsonl", b'"3+2="', b'"3+4="'),
    "data.train/rows.jsonl has changed since": lambda project: (project / "rows.jsonl").open("a").write(ROWS),
    "data.eval/mine has changed": rewrite("held_out.jsonl", b'"answer": "3"', b'"answer": "4"'),
    "model.path/model.safetensors has changed": flip("model/model.safetensors", -1),
    "model.path/tokenizer.json has changed": flip("model/tokenizer.json", 200),
    "model.path/chat_template.jinja is new": lambda project: (project / "model/chat_template.jinja").write_text("x"),
    "model.path/generation_config.json is gone": lambda project: (project / "model/generation_config.json").unlink(),
    "reward.name/grading/mine.py has changed": rewrite("grading/mine.py", b"True", b"False"),
    "reward.name/grading/rules.py has changed": rewrite("grading/rules.py", b"right", b"wrong"),
    "reward.name/units/table.py has changed": rewrite("units/table.py", b"1", b"2"),
    "reward.name/units/__init__.py has changed": rewrite("units/__init__.py", b"mine", b"mine, rules"),
    "reward.name/grading/__init__.py is new": lambda project: (project / "grading/__init__.py").touch(),
}


@pytest.mark.parametrize("words", CHANGED)
def test_a_change_of_what_the_run_reads_is_refused_by_file(project, words):
    folder = begin(project)
    CHANGED[words](project)
    message = refusal(load(project))
    assert message.startswith(words) and str(folder) in message and "restore it, or start another run" in message


def test_copies_and_what_is_not_read_change_nothing(project):
    begin(project)
    for path in (project / "rows.jsonl", *(project / "model").iterdir()):
        os.utime(path, (1, 1))
    (project / "model/README.md").write_text("about")
    rewrite("other.py", b"1", b"2")(project)
    rewrite("held_out.jsonl", b'"8+2="', b'"8+9="')(project)  # behind eval_limit
    rewrite("rows.jsonl", b'{"question"', b'{"note": "new", "question"')(project)
    check_inputs(load(project))


def test_what_was_read_for_the_checks_is_not_read_again(project):
    config = load(project)
    begin(project)
    problems = load_splits(config.data, "train")
    (project / "rows.jsonl").unlink()
    (project / "held_out.jsonl").unlink()
    check_inputs(config, problems)
    with run_folder(load(project, f"run.dir={project}/other"), "train", False, problems):
        pass
    records = [json.loads((project / run / "inputs.json").read_text()) for run in ("run", "other")]
    assert records[0] == records[1] and "data.eval/mine" in records[0]


def test_a_run_of_before_the_record_is_gone_on_with_and_recorded_then(project, capsys):
    folder = begin(project)
    (folder / "inputs.json").unlink()
    check_inputs(load(project))
    assert "whether what it reads is the same is not checked" in capsys.readouterr().err
    with run_folder(load(project), "train", resume=True):
        pass
    flip("model/model.safetensors", -1)(project)
    assert "model.safetensors has changed" in refusal(load(project))


@pytest.mark.parametrize("text", ["", "{", "3", '"x"'])
def test_a_damaged_record_is_refused(project, text):
    folder = begin(project)
    (folder / "inputs.json").write_text(text)
    assert "inputs.json is damaged" in refusal(load(project))


def test_a_fresh_start_is_refused_wherever_there_is_a_trace_of_a_run(project):
    config = load(project)
    for trace in ("metrics.jsonl", "samples/step_000001.jsonl", "checkpoints/step_000002/state.json", "hf/config.json"):
        path = project / "run" / trace
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        assert "already holds a run; name another folder, or go on with --resume" in refusal(config, resume=False)
        shutil.rmtree(project / "run")
    (project / "run/logs").mkdir(parents=True)
    (project / "run/config.yaml").write_text("a start that failed")
    (project / "run/metrics.jsonl").touch()
    check_run_folder(config, "train", resume=False)


def test_a_folder_of_another_kind_is_refused_by_each_command(project):
    begin(project, f"run.dir={project}/sft", command="sft")
    message = refusal(load(project, f"run.dir={project}/sft"))
    assert message.endswith("already holds a run of sft; name another folder")
    begin(project)
    assert "already holds a run; name another folder" in refusal(load(project), resume=False, command="sft")
    with pytest.raises(UserError, match="already holds a run; name another folder"):
        check_continues(load(project))
    study = (
        f"study: {{dir: {project}/study, recipes: [raft], seeds: [0]}}\n"
        + CONFIG.format(folder=project).partition("\n")[2]
    )
    (project / "study.yaml").write_text(study)
    (row,) = load_study(project / "study.yaml").rows
    row.folder.mkdir(parents=True)
    (row.folder / "config.yaml").write_text(dump_config(row.config))
    assert "already holds a study" in refusal(load(project, f"run.dir={project}/study"))
    with pytest.raises(UserError, match="already holds a run; name another folder"):
        load_study(project / "study.yaml", overrides=[f"study.dir={project}/run"])


def test_a_config_that_cannot_be_read_is_refused_by_name(project):
    folder = begin(project)
    (folder / "config.yaml").unlink()
    assert "config.yaml can't be read (" in refusal(load(project))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("start", "beyond"), [(2, [3, 4]), (0, [0, 1, 2, 3, 4])])
def test_what_lies_beyond_the_chosen_checkpoint_is_moved_not_deleted(project, start, beyond):
    folder = begin(project)
    before = contents(folder)
    aside = set_aside(folder, start)
    assert aside == folder / "history/001" and aside.joinpath("metrics.jsonl").read_text() == before["metrics.jsonl"]
    now = contents(folder)
    kept = [step for step in range(5) if step not in beyond]
    assert now["metrics.jsonl"] == "".join(f'{{"step": {step}}}\n' for step in kept)
    for name, text in before.items():
        if name != "metrics.jsonl":
            assert now.get(name) == text or now[f"history/001/{name}"] == text, name
    assert (folder / "checkpoints/step_000004").exists() is False
    assert (folder / "checkpoints/step_000002").exists() == (start == 2)
    assert set_aside(folder, start) is None, "nothing is beyond any more"


def test_a_torn_or_unended_last_line_goes_aside_and_each_resume_has_its_own_folder(project):
    folder = begin(project)
    metrics = folder / "metrics.jsonl"
    for number, torn in enumerate(('{"step": 5, "lo', '{"step": 4}', "4\n", "[]\n", "\0\0"), 1):
        metrics.write_text('{"step": 3}\n' + torn)
        assert set_aside(folder, 4) == folder / f"history/{number:03d}"
        assert metrics.read_text() == '{"step": 3}\n' + ('{"step": 4}\n' if torn == '{"step": 4}' else "")


def test_one_command_at_a_time_is_in_a_folder_and_the_other_is_named(project):
    config = load(project)
    with run_folder(config, "train", resume=False):
        for command in ("train", "sft"):
            words = f"run.dir={project}/run: megarl train is running there; wait for it"
            with pytest.raises(UserError, match=words), run_folder(config, command, resume=False):
                pass
    with run_folder(config, "sft", resume=False):
        pass
    assert held_by(project / "run") is None


@pytest.mark.processes
def test_the_lock_ends_with_its_process_whatever_ends_it(project):
    program = "import sys, time\nfrom megarl.files import locked\nfrom pathlib import Path\n"
    program += (
        "with locked(Path(sys.argv[1]), 'run.dir', 'megarl train'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(project / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="megarl train is running there"), run_folder(load(project), "sft", False):
        pass
    process.kill()
    process.wait()
    with run_folder(load(project), "sft", False):
        pass


def test_what_another_run_left_since_the_first_check_is_seen_under_the_lock(project):
    config = load(project)
    check_run_folder(config, "train", resume=False)
    begin(project)
    with pytest.raises(UserError, match="already holds a run"), run_folder(config, "train", resume=False):
        pass
