from pathlib import Path

import pytest

from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.config import dump_config, load_config, parse_config, sections
from megarl.config.shipped import copy_config
from megarl.rewards import REWARDS
from megarl.types import UserError

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
RUNS = sorted(path for path in QUICKSTART.parent.glob("*.yaml") if not path.name.startswith("study_"))
MINIMAL = "model: {path: a/model}\ndata: {train: arithmetic}\n"


def load(tmp_path, text="", *overrides):
    """The config of MINIMAL, further sections and overrides."""
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + text)
    return load_config(path, list(overrides))


def refusal(tmp_path, text="", *overrides):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    assert load_config(path).model.path


def test_what_is_not_set_has_the_papers_defaults(tmp_path):
    config = load(tmp_path)
    assert config.recipe == RECIPES["raft_pp"]
    assert (config.schedule.prompts_per_step, config.schedule.samples_per_prompt) == (1024, 4)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.grad_clip) == (1e-6, 0.01, 1.0)
    assert (config.optim.beta1, config.optim.beta2, config.optim.lr_schedule) == (0.9, 0.999, "constant")
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.0, 1.0, 0)
    assert config.data.max_prompt_tokens == 1024


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optm: {lr: 1.0}", "optm is not a known key, did you mean optim?"),
        ("run: {step: 3}", "run.step is not a known key, did you mean steps?"),
        ("rollout: {max_respons_tokens: 3}", "did you mean max_response_tokens?"),
        ("recipe: {name: grpo, clip_hi: 0.3}", "recipe.clip_hi is not a known key, did you mean clip_high?"),
        ("reward: {zzz: 1}", "reward.zzz is not a known key; known keys: name, lenient, workers, cpu_seconds"),
        ("recipe: grop", "recipe='grop' is unknown, did you mean grpo?; recipes: raft, raft_pp, raft_pp_no_clip"),
        ("critic: {head_start: 3}", "critic.head_start is not a known key, did you mean head_start_steps?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: many}", "run.steps='many': should be integer"),
        ("run: {steps: '10'}", "run.steps='10': should be integer"),
        ("run: {steps: 1.5}", "run.steps=1.5: should be integer"),
        ("run: {steps: true}", "run.steps=True: should be integer"),
        ("run: {steps: 0}", "run.steps=0: should be greater than or equal to 1"),
        ("run: {seed: 4294967296}", "run.seed=4294967296: should be less than 4294967296"),
        ("run: {dir: ''}", "run.dir='': names no file or folder"),
        ("run: {dir: ' '}", "run.dir=' ': names no file or folder"),
        ('run: {dir: "a\\0b"}', "run.dir='a\\x00b': names no file or folder"),
        ("run: {export: 1}", "run.export=1: should be boolean"),
        ("run: {dir: 3}", "run.dir=3: should be string"),
        ("run:", "run=None: should be a section"),
        ("run: [steps]", "run=['steps']: should be a section"),
        ("optim: {lr: -1.0}", "optim.lr=-1.0: should be greater than or equal to 0"),
        ("optim: {lr: .inf}", "optim.lr=inf: should be a finite number"),
        ("optim: {lr: .nan}", "optim.lr=nan: should be a finite number"),
        ("optim: {lr_schedule: linear}", "optim.lr_schedule='linear': should be 'constant' or 'cosine'"),
        ("rollout: {top_p: 1.5}", "rollout.top_p=1.5: should be less than or equal to 1"),
        ("recipe: {name: grpo, wrong_reward: 0.5}", "recipe.wrong_reward=0.5: should be 0.0 or -1.0"),
        ("recipe: {name: raft, clip: ppo}", "recipe.clip=ppo acts only with ratio=token or sequence"),
        ("learner: {recompute: some}", "learner.recompute='some': should be 'none' or 'full'"),
        ("critic: {lr: -1.0}", "critic.lr=-1.0: should be greater than or equal to 0"),
        ("critic: {head_start_steps: -1}", "critic.head_start_steps=-1: should be greater than or equal to 0"),
        ("setting: papr", "setting='papr': should be 'none', 'paper' or 'minimal_rl'"),
        ("setting:", "setting=None: should be 'none', 'paper' or 'minimal_rl'"),
        ("setting: [paper]", "setting=['paper']: should be 'none', 'paper' or 'minimal_rl'"),
        ("1: 2", "1=1: Keys should be strings"),
    ],
)
def test_a_wrong_type_or_value_is_refused_with_what_would_be_legal(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("answer_pattern", "(", "not a regular expression"),
        ("answer_pattern", "####", "needs one group"),
        ("prompt_template", "Solve it.", "must contain {problem}"),
    ],
)
def test_data_patterns_are_checked(tmp_path, field, value, words):
    message = refusal(tmp_path, "", f"data.{field}={value}")
    assert message.startswith(f"data.{field}='{value}'") and words in message


def test_every_mistake_gets_its_line(tmp_path):
    message = refusal(tmp_path, "run: {seed: -1, steps: 0}\noptim: {lr: high}\n")
    assert [line.split("=")[0] for line in message.splitlines()] == ["run.seed", "run.steps", "optim.lr"]


def test_required_sections_and_keys_are_named(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {steps: 3}")
    with pytest.raises(UserError, match="^model is required\ndata is required$"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("model: {precision: bf16}\ndata: {train: arithmetic}")
    with pytest.raises(UserError, match="^model.path is required$"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: {steps: 3\n", "line 2: not valid YAML"),
        (b"run:\n\tsteps: 3\n", "line 2: not valid YAML"),
        (b"run: {dir: a}\noptim: {lr: 1}\nrun: {steps: 3}\n", "line 3: not valid YAML (run is given twice)"),
        (b"run: {steps: 3,\n  steps: 4}\n", "line 2: not valid YAML (steps is given twice)"),
        (b"run: \xff", "not valid YAML"),
        (b"run: \x00", "not valid YAML"),
        (b"", "expected sections"),
        (b"just words", "expected sections"),
        (b"- run", "expected sections"),
    ],
)
def test_a_broken_file_is_refused_by_name_and_line(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and "\n" not in message


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("1E-3", 1e-3), ("5.0e-4", 5e-4), (".5e-2", 5e-3), ("1e+1", 10.0), ("1", 1.0)]
)
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text, value):
    for config in (load(tmp_path, f"optim: {{lr: {text}}}"), load(tmp_path, "", f"optim.lr={text}")):
        assert config.optim.lr == value


def test_overrides_win_over_the_file_in_their_order(tmp_path):
    config = load(
        tmp_path,
        "run: {steps: 3, seed: 4}",
        "run.steps=5",
        "run.steps=6",
        "data.eval=null",
        "data.subset=main",
        "data.prompt_template={problem} = ?",
        "run.export=false",
        "learner.world_size=",
    )
    assert (config.run.steps, config.run.seed, config.run.export) == (6, 4, False)
    assert (config.data.eval, config.data.subset, config.data.prompt_template) == (None, "main", "{problem} = ?")
    assert config.learner.world_size is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "override 'steps': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("optim.lr=[1", "override 'optim.lr=[1': '[1' is not a YAML value"),
        ("run={steps: 1, steps: 2}", "is not a YAML value"),
        ("data.train.file=x", "override 'data.train.file=x': data.train is a value, not a section"),
        ("optim.learning_rate=1", "optim.learning_rate is not a known key"),
    ],
)
def test_a_malformed_override_is_refused(tmp_path, override, words):
    assert words in refusal(tmp_path, "", override)


@pytest.mark.parametrize(
    ("text", "overrides", "recipe"),
    [
        ("recipe: grpo", [], RECIPES["grpo"]),
        ("", ["recipe=grpo"], RECIPES["grpo"]),
        ("recipe: raft", ["recipe=grpo"], RECIPES["grpo"]),
        ("recipe: {name: grpo, clip_high: 0.28}", [], RECIPES["grpo"].model_copy(update={"clip_high": 0.28})),
        ("recipe: grpo", ["recipe.clip_high=0.28"], RECIPES["grpo"].model_copy(update={"clip_high": 0.28})),
        (
            "recipe: {name: mine, base: reinforce, dropped: zero}",
            [],
            RECIPES["reinforce"].model_copy(update={"name": "mine", "dropped": "zero"}),
        ),
        ("recipe: {name: mine, base: none, baseline: mean}", [], Recipe(name="mine", baseline="mean")),
        ("recipe: {base: none, wrong_reward: -1}", [], Recipe(wrong_reward=-1.0)),
    ],
)
def test_a_recipe_is_a_name_or_fields_on_a_base(tmp_path, text, overrides, recipe):
    assert load(tmp_path, text, *overrides).recipe == recipe


@pytest.mark.parametrize("text", ["recipe: {name: mine}", "recipe: {name: mine, base: grop}", "recipe: {name: [grpo]}"])
def test_a_recipe_without_a_known_base_is_refused_with_the_known_ones(tmp_path, text):
    message = refusal(tmp_path, text)
    assert all(name in message for name in RECIPES) and "base" in message


@pytest.mark.parametrize("text", ["recipe:", "recipe: [grpo]", "recipe: 3", "recipe: {baseline: mean}"])
def test_something_that_is_no_recipe_is_refused_with_the_names(tmp_path, text):
    assert refusal(tmp_path, text).endswith(f"names: {', '.join(RECIPES)}")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["recipe=grpo"],
        ["recipe={name: mine, base: grpo, clip_high: 0.28, dual_clip: 3}"],
        ["recipe={name: none-of-these, base: none}"],
        ["optim.lr=2.5e-7", "optim.eps=1e-12", "data.eval=null", "learner.world_size=4"],
        ["run.dir=1e5", "data.subset=2e-4", "data.answer_pattern=#### (.*)", "data.train_split=no"],
        ["data.system_prompt=a: b\n# c\n", "data.prompt_template='\"{problem}\" é'"],
    ],
)
def test_a_dumped_configuration_loads_as_the_same_one(tmp_path, overrides):
    config = load_config(QUICKSTART, overrides)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


GROUP_FIELDS = [
    "baseline: mean",
    "baseline: leave_one_out",
    "baseline: length_mean",
    "group_filter: all_wrong",
    "group_filter: all_correct",
    "group_filter: both",
    "backfill: adaptive",
    "objective: dpo",
]


@pytest.mark.parametrize("field", GROUP_FIELDS)
def test_one_sample_per_prompt_is_refused_where_a_field_compares_a_group(tmp_path, field):
    text = f"schedule: {{samples_per_prompt: 1}}\nrecipe: {{name: x, base: none, {field}}}"
    message = refusal(tmp_path, text)
    assert message.startswith("schedule.samples_per_prompt=1 gives recipe x nothing to compare")
    assert f"({field.replace(': ', '=')})" in message and message.endswith("use at least 2")
    load(tmp_path, text, "schedule.samples_per_prompt=2")


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("reinforce_rej", "group_filter=both"),
        ("reinforce_rej_std", "group_filter=both, scale=group_std"),
        ("grpo", "baseline=mean, scale=group_std"),
        ("maxrl", "baseline=mean, scale=group_mean"),
        ("scale_rl", "group_filter=both, baseline=mean"),
        ("dapo", "group_filter=both, baseline=mean, scale=group_std"),
        ("reinforce_ada", "backfill=adaptive, baseline=pool_mean"),
        ("iterative_dpo", "objective=dpo"),
    ],
)
def test_one_sample_per_prompt_names_all_that_compares_a_group(tmp_path, recipe, fields):
    message = refusal(tmp_path, f"schedule: {{samples_per_prompt: 1}}\nrecipe: {recipe}")
    assert f"recipe {recipe} " in message and f"({fields})" in message


@pytest.mark.parametrize("recipe", ["raft", "raft_pp", "reinforce", "remax", "ppo", "reinforce_plus_plus"])
def test_one_sample_per_prompt_is_fine_without_a_group(tmp_path, recipe):
    assert load(tmp_path, f"schedule: {{samples_per_prompt: 1}}\nrecipe: {recipe}").recipe.name == recipe


def test_every_reward_that_ships_can_be_chosen():
    assert tuple(REWARDS) == sections.REWARDS


def test_maxrl_refuses_rewards_of_plus_and_minus_one(tmp_path):
    message = refusal(tmp_path, "recipe: {name: maxrl, wrong_reward: -1.0}")
    assert "recipe.scale=group_mean" in message and message.endswith("use wrong_reward=0.0")


@pytest.mark.parametrize("sampling", ["rollout.top_p=0.9", "rollout.top_k=50"])
@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ("raft_pp", "ratio=token"),
        ("gspo", "ratio=sequence"),
        ("kimi_k2", "proximal=squared_log_ratio"),
        ("iterative_dpo", "objective=dpo"),
        ("{name: raft, mismatch: token_tis}", "mismatch=token_tis"),
        ("{name: grpo, mismatch: geo_reject}", "ratio=token, mismatch=geo_reject"),
    ],
)
def test_what_compares_with_the_policy_that_sampled_refuses_truncated_sampling_unless_told(
    tmp_path, recipe, field, sampling
):
    message = refusal(tmp_path, f"recipe: {recipe}", sampling)
    assert sampling in message and f"({field})" in message and "rollout.allow_truncated_sampling=true" in message
    load(tmp_path, f"recipe: {recipe}", sampling, "rollout.allow_truncated_sampling=true")


@pytest.mark.parametrize("recipe", ["raft", "rloo", "opo", "remax", "reinforce_plus_plus", "maxrl"])
def test_plain_likelihood_accepts_truncated_sampling(tmp_path, recipe):
    load(tmp_path, f"recipe: {recipe}", "rollout.top_p=0.9", "rollout.top_k=50")


@pytest.mark.parametrize(
    ("world_size", "tp", "pp", "words"),
    [
        (3, 2, 1, "tensor_model_parallel_size x pipeline_model_parallel_size = 2; use 2 or 4 ranks"),
        (6, 2, 2, "= 4; use 4 or 8 ranks"),
        (2, 2, 2, "= 4; use 4 ranks"),
    ],
)
def test_a_world_size_that_does_not_factor_is_refused_with_the_nearest_that_do(tmp_path, world_size, tp, pp, words):
    layout = f"tensor_model_parallel_size: {tp}, pipeline_model_parallel_size: {pp}"
    message = refusal(tmp_path, f"learner: {{world_size: {world_size}, {layout}}}")
    assert message.startswith(f"learner.world_size={world_size} ") and message.endswith(words)


def test_data_parallel_size_is_what_the_model_leaves_over(tmp_path):
    learner = load(tmp_path, "learner: {world_size: 8, tensor_model_parallel_size: 2}").learner
    assert (learner.model_parallel_size, learner.data_parallel_size(8), learner.data_parallel_size(2)) == (2, 4, 1)
    with pytest.raises(UserError, match="learner.world_size=5"):
        learner.data_parallel_size(5)


def test_a_minibatch_larger_than_the_step_is_refused(tmp_path):
    text = "schedule: {prompts_per_step: 8, minibatch_prompts: 9}"
    message = refusal(tmp_path, text)
    assert "schedule.minibatch_prompts=9" in message and "schedule.prompts_per_step=8" in message
    assert load(tmp_path, text, "schedule.minibatch_prompts=8").updates_per_step == 1


@pytest.mark.parametrize(("minibatch", "epochs", "updates"), [("null", 1, 1), ("null", 2, 2), (4, 1, 2), (3, 2, 6)])
def test_updates_per_step_count_minibatches_and_epochs(tmp_path, minibatch, epochs, updates):
    text = f"schedule: {{prompts_per_step: 8, minibatch_prompts: {minibatch}, epochs: {epochs}}}"
    assert load(tmp_path, text).updates_per_step == updates


def test_a_micro_batch_must_hold_the_longest_sequence(tmp_path):
    lengths = ["data.max_prompt_tokens=100", "rollout.max_response_tokens=50", "eval.max_response_tokens=70"]
    message = refusal(tmp_path, "", *lengths, "learner.micro_batch_tokens=169")
    assert "learner.micro_batch_tokens=169" in message and "= 170" in message
    assert load(tmp_path, "", *lengths, "learner.micro_batch_tokens=170").max_sequence_tokens == 170


def test_a_micro_batch_of_dpo_must_hold_the_longest_pair(tmp_path):
    text = "recipe: iterative_dpo"
    lengths = ["data.max_prompt_tokens=100", "rollout.max_response_tokens=70"]
    message = refusal(tmp_path, text, *lengths, "learner.micro_batch_tokens=339")
    assert "learner.micro_batch_tokens=339" in message and "pair of sequences, 2 x (" in message
    assert message.endswith("= 340; use at least that")
    load(tmp_path, text, *lengths, "learner.micro_batch_tokens=340")


def test_the_tokens_of_a_soft_penalty_must_fit_the_response(tmp_path):
    text = "recipe: {name: dapo, overlong_cache_tokens: 65}"
    message = refusal(tmp_path, text, "rollout.max_response_tokens=64")
    assert "recipe.overlong_cache_tokens=65" in message and "rollout.max_response_tokens=64" in message
    load(tmp_path, text, "rollout.max_response_tokens=65")


def test_the_critic_has_its_own_rate_and_shares_the_rest_of_the_optimizer(tmp_path):
    config = load(tmp_path, "optim: {lr: 2e-6, warmup_steps: 7, weight_decay: 0.5, lr_schedule: cosine}")
    assert (config.critic.lr, config.critic.warmup_steps, config.critic.head_start_steps) == (1e-5, 0, 0)
    assert config.critic_optim == config.optim.model_copy(update={"lr": 1e-5, "warmup_steps": 0})
    config = load(tmp_path, "recipe: ppo\ncritic: {lr: 3e-5, warmup_steps: 2, head_start_steps: 4}")
    assert (config.critic_optim.lr, config.critic_optim.warmup_steps, config.optim.lr) == (3e-5, 2, 1e-6)
    assert config.critic.head_start_steps == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: grpo\ncritic: {head_start_steps: 3}", "critic.head_start_steps=3, but recipe grpo has no critic"),
        ("recipe: ppo\nrun: {steps: 3}\ncritic: {head_start_steps: 3}", "leaves the policy none of run.steps=3"),
    ],
)
def test_a_head_start_needs_a_critic_and_steps_left_for_the_policy(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


def test_a_setting_gives_the_published_values(tmp_path):
    config = load(tmp_path, "setting: paper")
    assert config.recipe == RECIPES["raft_pp"]
    assert (config.schedule.prompts_per_step, config.schedule.samples_per_prompt) == (1024, 4)
    assert (config.schedule.minibatch_prompts, config.updates_per_step) == (512, 2)
    assert (config.optim.lr, config.rollout.max_response_tokens, config.eval.samples_per_prompt) == (1e-6, 4096, 16)
    assert config.data.chat_template and "\\boxed{}" in config.data.prompt_template
    scripts = load(tmp_path, "setting: minimal_rl")
    assert (scripts.updates_per_step, scripts.rollout.max_response_tokens) == (4, 3072)


def test_a_setting_stands_below_the_values_that_are_given(tmp_path):
    text = "setting: minimal_rl\noptim: {lr: 3e-4}\nschedule: {prompts_per_step: 8, minibatch_prompts: null}"
    config = load(tmp_path, text, "rollout.max_response_tokens=99", "data.prompt_template={problem}")
    assert (config.optim.lr, config.optim.weight_decay) == (3e-4, 0.01)
    assert (config.schedule.prompts_per_step, config.schedule.minibatch_prompts) == (8, None)
    assert (config.rollout.max_response_tokens, config.data.prompt_template) == (99, "{problem}")
    assert config.data.chat_template and config.data.train == "arithmetic"


@pytest.mark.parametrize("name", RECIPES)
def test_a_setting_may_change_the_fields_of_a_shipped_recipe(tmp_path, name):
    assert load(tmp_path, f"setting: paper\nrecipe: {name}").recipe == RECIPES[name]
    scripts = load(tmp_path, f"setting: minimal_rl\nrecipe: {name}").recipe
    assert scripts == Recipe.named(name, "minimal_rl")
    assert (scripts == RECIPES[name]) == (name == "iterative_dpo")


def test_fields_of_ones_own_recipe_stand_above_the_settings(tmp_path):
    text = "setting: minimal_rl\nrecipe: {name: mine, base: grpo, kl_coef: 0.5}"
    assert load(tmp_path, text).recipe == Recipe.named("grpo", "minimal_rl", name="mine", kl_coef=0.5)
    text = "setting: minimal_rl\nrecipe: {name: mine, base: none, baseline: mean}"
    assert load(tmp_path, text).recipe == Recipe(
        name="mine", baseline="mean", aggregation="token_mean", dropped="zero", entropy_coef=0.001
    )
    text = "setting: minimal_rl\nrecipe: {name: mine, base: raft_pp, clip: none}"
    assert load(tmp_path, text).recipe.dual_clip is None
    text = "setting: minimal_rl\nrecipe: {name: mine, base: none, objective: dpo}"
    assert load(tmp_path, text).schedule.epochs == 2
    assert load(tmp_path, "setting: minimal_rl", "recipe=grpo", "recipe.dual_clip=null").recipe.dual_clip is None


@pytest.mark.parametrize(
    "recipe", ["ppo", "{name: mine, base: ppo, value_clip: 0.2}", "{name: a, base: none, baseline: critic}"]
)
def test_the_script_of_ppo_drew_one_sample_a_prompt_and_had_no_kl(tmp_path, recipe):
    scripts = load(tmp_path, f"setting: minimal_rl\nrecipe: {recipe}")
    assert scripts.schedule.samples_per_prompt == 1 and scripts.schedule.minibatch_prompts == 256
    assert not scripts.recipe.needs_reference and scripts.recipe.needs_critic
    assert load(tmp_path, f"setting: paper\nrecipe: {recipe}").schedule.samples_per_prompt == 4
    given = load(tmp_path, f"setting: minimal_rl\nrecipe: {recipe}\nschedule: {{samples_per_prompt: 2}}")
    assert given.schedule.samples_per_prompt == 2


def test_rounds_that_never_fill_a_group_are_refused(tmp_path):
    message = refusal(tmp_path, "recipe: reinforce_ada\nschedule: {samples_per_prompt: 33}")
    assert message == (
        "recipe.samples_per_round=8 in recipe.backfill_rounds=4 rounds never make schedule.samples_per_prompt=33; "
        "raise one, or lower that"
    )
    assert load(tmp_path, "recipe: reinforce_ada\nschedule: {samples_per_prompt: 32}").recipe.samples_per_round == 8


@pytest.mark.parametrize("mismatch", ["geo_reject", "token_icepop"])
def test_the_bounds_of_a_mismatch_survive_the_dump(tmp_path, mismatch):
    config = load(tmp_path, f"recipe: {{name: grpo, mismatch: {mismatch}}}")
    assert config.recipe.mismatch_high == {"geo_reject": 1.001, "token_icepop": 5.0}[mismatch]
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize("setting", ["paper", "minimal_rl"])
@pytest.mark.parametrize("recipe", ["iterative_dpo", "{name: mine, base: iterative_dpo, dpo_beta: 0.2}"])
def test_a_setting_runs_iterative_dpo_on_its_own_schedule(tmp_path, setting, recipe):
    config = load(tmp_path, f"setting: {setting}\nrecipe: {recipe}")
    assert (config.schedule.samples_per_prompt, config.schedule.minibatch_prompts, config.schedule.epochs) == (
        8,
        128,
        2,
    )
    assert (config.optim.lr, config.optim.lr_schedule) == (5e-7, "cosine")
    assert (config.schedule.prompts_per_step, config.updates_per_step) == (1024, 16)
    assert load(tmp_path, f"setting: {setting}\nrecipe: {recipe}", "schedule.epochs=1").schedule.epochs == 1


@pytest.mark.parametrize("setting", ["paper", "minimal_rl"])
def test_every_recipe_runs_under_every_setting_and_its_dump_is_the_same_configuration(tmp_path, setting):
    for name in RECIPES:
        config = load(tmp_path, f"setting: {setting}\nrecipe: {name}")
        assert config.setting == setting
        (tmp_path / "dumped.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: [grpo]", "recipe: expected a name or fields, got ['grpo']"),
        ("recipe: 3", "recipe: expected a name or fields, got 3"),
        ("recipe:", "recipe: expected a name or fields, got None"),
        ("recipe: grop", "recipe='grop' is unknown, did you mean grpo?"),
        ("recipe: {name: [grpo]}", "recipe=['grpo'] is unknown"),
        ("recipe: {name: mine, base: {}}", "recipe={} is unknown"),
        ("optim: [lr]", "optim=['lr']: should be a section"),
        ("schedule:", "schedule=None: should be a section"),
        ("optim: {learning_rate: 1}", "optim.learning_rate is not a known key"),
    ],
)
def test_a_mistake_is_refused_the_same_under_a_setting(tmp_path, text, words):
    assert words in refusal(tmp_path, text)
    assert words in refusal(tmp_path, f"setting: paper\n{text}")


def test_a_configuration_does_not_change(tmp_path):
    config = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3


def test_overrides_do_not_reach_the_values_they_were_given():
    values = {"model": {"path": "m"}, "data": {"train": "arithmetic"}, "recipe": {"name": "grpo", "clip_low": 0.1}}
    for setting in ("none", "paper"):
        values["setting"] = setting
        parse_config(values)
        assert values == {
            "model": {"path": "m"},
            "data": {"train": "arithmetic"},
            "recipe": {"name": "grpo", "clip_low": 0.1},
            "setting": setting,
        }


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~/a.jsonl", "/home/anna/a.jsonl"),
        ("math500=~/a.jsonl", "math500=/home/anna/a.jsonl"),
        ("[gsm8k, b=~/b.jsonl, ~/c.jsonl]", ["gsm8k", "b=/home/anna/b.jsonl", "/home/anna/c.jsonl"]),
        ("{b: ~/b.jsonl, c: d~.jsonl}", {"b": "/home/anna/b.jsonl", "c": "d~.jsonl"}),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, given, expanded):
    monkeypatch.setenv("HOME", "/home/anna")
    paths = ["run.dir=~/runs/a", "model.path=~/model", "data.train=~/rows.jsonl", f"data.eval={given}"]
    config = load(tmp_path, "", *paths)
    assert (config.run.dir, config.model.path) == ("/home/anna/runs/a", "/home/anna/model")
    assert (config.data.train, config.data.eval) == ("/home/anna/rows.jsonl", expanded)
    in_file = f"model: {{path: ~/model}}\ndata: {{train: ~/rows.jsonl, eval: {given}}}\nrun: {{dir: ~/runs/a}}"
    (tmp_path / "all.yaml").write_text(in_file)
    assert load_config(tmp_path / "all.yaml") == config
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/all.yaml").model.path == f"{tmp_path}/model"


def test_megarls_own_configs_and_model_are_there_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("quickstart")
    assert (Path(config.model.path) / "config.json").is_file()
    copy = copy_config("quickstart")
    assert load_config(copy) == config and "path: built-in" in dump_config(config)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config("again.yaml") == config
    with pytest.raises(UserError, match=r"quickstart.yaml is here already"):
        copy_config("quickstart")
    with pytest.raises(UserError, match=r"config file mine does not exist; megarl brings .*quickstart"):
        load_config("mine")


OFF_POLICY = "recipe: {name: raft_pp, old_policy: rollout}"


@pytest.mark.parametrize(
    ("text", "overrides", "key", "fix"),
    [
        ("", ["schedule.partial_rollouts=64"], "schedule.partial_rollouts=64", "partial_rollouts=null"),
        ("", ["rollout.weight_update=in_flight"], "rollout.weight_update=in_flight", "weight_update=drain"),
        (
            OFF_POLICY,
            ["schedule.max_staleness=1", "schedule.partial_rollouts=64", "rollout.weight_update=in_flight"],
            "schedule.partial_rollouts=64",
            "use drain",
        ),
        ("recipe: raft", ["schedule.max_staleness=1", "schedule.epochs=2"], "schedule.epochs=2", "epochs=1"),
        ("recipe: raft_pp", ["schedule.max_staleness=1"], "schedule.max_staleness=1", "recipe.old_policy=rollout"),
        ("recipe: kimi_k2", ["schedule.max_staleness=3"], "schedule.max_staleness=3", "recipe.mismatch"),
        (
            "recipe: raft",
            ["schedule.max_staleness=1", "learner.offload=all"],
            "learner.offload=all",
            "under schedule.max_staleness=1 none do",
        ),
        (
            "",
            ["rollout.placement=disaggregated", "learner.offload=optimizer"],
            "learner.offload=optimizer",
            "under rollout.placement=disaggregated none do",
        ),
        ("", ["schedule.max_staleness=-1"], "schedule.max_staleness", "0"),
    ],
)
def test_what_staleness_contradicts_is_refused(tmp_path, text, overrides, key, fix):
    message = refusal(tmp_path, text, *overrides)
    assert key in message and fix in message and "\n" not in message


def test_sharing_prompts_needs_packing(tmp_path):
    message = refusal(tmp_path, "", "learner.share_prompts=true", "learner.packing=false")
    assert "learner.share_prompts=true" in message and "learner.packing=false; use true" in message
    for value, expected in (("auto", "auto"), ("false", False)):
        config = load(tmp_path, "", f"learner.share_prompts={value}", "learner.packing=false")
        assert config.learner.share_prompts == expected
    assert load(tmp_path, "", "learner.share_prompts=true").learner.share_prompts is True


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (OFF_POLICY, ["schedule.epochs=2"]),
        (OFF_POLICY, ["schedule.partial_rollouts=64"]),
        (OFF_POLICY, ["rollout.weight_update=in_flight"]),
        ("recipe: {name: grpo, mismatch: token_tis}", []),
        ("recipe: raft", []),
        ("recipe: iterative_dpo", ["schedule.epochs=2"]),
    ],
)
def test_what_says_how_it_uses_older_samples_may_be_stale(tmp_path, text, overrides):
    assert load(tmp_path, text, "schedule.max_staleness=2", *overrides).schedule.max_staleness == 2
