"""Overrides: a key that takes text takes it as it stands, on every way to it; anything else is YAML."""

import pytest
from texts import strings

from megarl.config import Config, dump_config, load_config, yaml12
from megarl.config.overrides import apply_override
from megarl.study.config import StudyFile, load_study
from megarl.types import UserError

MINIMAL = "model: {path: a/model}\ndata: {train: arithmetic}\n"
STUDY = f"study: {{dir: runs/s, recipes: [grpo], seeds: [0]}}\n{MINIMAL}".replace(
    "arithmetic}", "arithmetic, eval: arithmetic}"
)


@pytest.fixture
def load(tmp_path):
    (tmp_path / "config.yaml").write_text(MINIMAL)
    return lambda *overrides: load_config(tmp_path / "config.yaml", list(overrides))


def test_a_text_key_takes_every_text_and_its_dump_gives_it_back(tmp_path):
    for text in strings():
        values = {}
        apply_override(values, f"data.prompt_template={text}")
        apply_override(values, f"data.system_prompt={text}")
        assert values["data"]["prompt_template"] == text
        assert values["data"]["system_prompt"] == (None if text in ("", "null") else text)


def test_a_dumped_configuration_gives_back_every_text(load, tmp_path):
    config = load()
    for text in list(strings())[::40]:
        data = {"prompt_template": text, "system_prompt": text, "eval": {"a": text}, "train": text}
        changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
        values = yaml12.load(dump_config(changed))
        assert values["data"] == changed.model_dump(mode="json")["data"]
    (tmp_path / "dumped.yaml").write_text(dump_config(load("data.answer_pattern=#### (.*)\n", "run.dir=  [x]: #y ")))
    dumped = load_config(tmp_path / "dumped.yaml")
    assert (dumped.data.answer_pattern, dumped.run.dir) == ("#### (.*)\n", "  [x]: #y ")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.answer_pattern=#### (.*)", "#### (.*)"),
        ("data.prompt_template={problem} Answer:", "{problem} Answer:"),
        ("data.prompt_template='{problem}' = ?", "'{problem}' = ?"),
        ("data.system_prompt= [a] ", " [a] "),
        ("data.subset=010", "010"),
        ("data.subset=null", None),
        ("data.subset=", None),
        ("data.train_split=null", "null"),
        ("run.dir=1:30", "1:30"),
        ("run.seed=010", 10),
        ("run.seed=0x1F", 31),
        ("run.export=false", False),
        ("optim.lr_schedule=cosine", "cosine"),
        ("learner.world_size=", None),
        ("recipe=grpo", "grpo"),
        ("recipe={name: mine, base: none}", {"name": "mine", "base": "none"}),
        ("recipe.name=#mine", "#mine"),
        ("recipe.base=no", "no"),
        ("recipe.clip_low=2e-1", 0.2),
        ("data.eval=a: b #c.jsonl", "a: b #c.jsonl"),
        ("data.eval=[gsm8k, math500=x.jsonl]", ["gsm8k", "math500=x.jsonl"]),
        ("data.eval={a: x.jsonl}", {"a": "x.jsonl"}),
        ("data.eval.a=#x: 1.jsonl", "#x: 1.jsonl"),
        ("data.eval=null", None),
    ],
)
def test_the_type_of_a_key_decides_how_its_text_is_read(override, value):
    values = {}
    apply_override(values, override)
    for part in override.partition("=")[0].split("."):
        values = values[part]
    assert (values, type(values)) == (value, type(value))


@pytest.mark.parametrize("text", ["1:30", "1_000", "yes", "1e3", "ten", "0o9"])
def test_what_is_no_decimal_number_is_refused_by_its_key(load, text):
    with pytest.raises(UserError, match=f"^run.seed='?{text if text != '1e3' else 1000.0}'?: should be integer"):
        load(f"run.seed={text}")


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "1"])
def test_a_switch_is_true_or_false(load, text):
    with pytest.raises(UserError, match="should be boolean, true or false"):
        load(f"run.export={text}")


def test_an_unknown_key_is_named_whatever_its_text(load):
    with pytest.raises(UserError, match="did you mean answer_pattern"):
        load("data.answer_patern=[#### (.*)")


def test_an_argument_that_is_not_utf_8_is_refused(load):
    with pytest.raises(UserError, match="not UTF-8 text"):
        load("data.train=\udce9.jsonl")


def test_a_study_reads_text_on_every_way_to_a_key(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    for where in ("", "study.overrides.grpo."):
        overrides = [f"{where}schedule.prompts_per_step=010", f"{where}run.wandb_project=#a: b"]
        (row,) = load_study(tmp_path / "study.yaml", overrides=[*overrides, "study.dir=#x: 010"]).rows
        assert (row.config.schedule.prompts_per_step, row.config.run.wandb_project) == (10, "#a: b")
        assert row.config.run.dir == "#x: 010/grpo/seed_0"
    scale = ["study.scales.big.set.data.system_prompt=a: #b", "study.scales.big.dir=010"]
    (tmp_path / "sized.yaml").write_text(STUDY.replace("seeds: [0]", "seeds: [0], scales: {big: {}}"))
    values = yaml12.load((tmp_path / "sized.yaml").read_text())
    for override in scale:
        apply_override(values, override, StudyFile)
    assert values["study"]["scales"]["big"] == {"set": {"data": {"system_prompt": "a: #b"}}, "dir": "010"}


def test_every_key_that_takes_text_is_read_as_text():
    """Of every section, the recipe included, so that a new key is covered."""
    for section, field in Config.model_fields.items():
        for key, declared in getattr(field.annotation, "model_fields", {}).items():
            if declared.annotation in (str, str | None):
                values = {}
                apply_override(values, f"{section}.{key}=#: [x")
                assert values[section][key] == "#: [x", f"{section}.{key}"
