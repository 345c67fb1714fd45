"""The sections of a configuration and their keys.

Everything that can be refused without a model or data set at hand is refused here, in one line that names the key and
what would be legal (`UserError`).
"""

from __future__ import annotations

import re
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.config.contradictions import contradictions
from megarl.config.shipped import BUILT_IN, BUILT_IN_MODEL
from megarl.types import UserError

DEFAULT_RECIPE = "raft_pp"
REWARDS = ("math", "countdown", "format")
FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # module:function
Precision = Literal["fp32", "bf16", "fp8"]


def place(text: str) -> str:
    """~ is the home folder; nothing, as an unset variable of the shell gives it, isn't the working folder."""
    if not text.strip() or "\0" in text:
        raise ValueError("names no file or folder")
    return expanduser(text)


PathText = Annotated[str, AfterValidator(place)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where the run lives and how long it is."""

    dir: PathText = Field("runs/default", description="run folder: checkpoints, metrics, samples, logs, config")
    seed: int = Field(0, ge=0, lt=1 << 32, description="seeds the prompt order and every rollout")
    steps: int = Field(100, ge=1, description="training steps; one step is one batch of fresh rollouts")
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints to keep")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    track_kl: bool = Field(False, description="keep the policy that the run starts from, and measure the KL to it")
    export: bool = Field(True, description="write the trained model as a Hugging Face folder at the end")
    wandb_project: str | None = Field(None, description="also log to this Weights & Biases project")

    def is_due(self, done: int, every: int) -> bool:
        """Whether something that happens `every` so many steps (0: never) happens after `done` steps."""
        return every > 0 and done % every == 0


class ModelConfig(Section):
    """The policy's starting point."""

    path: PathText = Field(
        description="Hugging Face folder of a Llama or Qwen2 model, with its tokenizer; built-in: the quick start's"
    )
    precision: Precision = Field(
        "fp32", description="of the learner and the rollout engine; fp8: learner only, rest bf16"
    )

    @field_validator("path")
    @classmethod
    def _find_built_in(cls, path: str) -> str:
        return str(BUILT_IN_MODEL) if path == BUILT_IN else path

    @field_serializer("path")
    def _as_given(self, path: str) -> str:
        return BUILT_IN if path == str(BUILT_IN_MODEL) else path


class EvalSet(NamedTuple):
    """One of the evaluation sets: its name, its file or hub data set, and whether the name was given as such."""

    name: str
    source: str
    is_named: bool


class DataConfig(Section):
    """Problems and how they become prompts."""

    train: PathText = Field(
        description="arithmetic (built in) | a .jsonl or .parquet file, a folder or a pattern (data/*.jsonl) of them"
        " | a hub data set such as openai/gsm8k"
    )
    train_split: str = "train"
    train_limit: int | None = Field(None, ge=1, description="use the first N problems")
    eval: str | list[str] | dict[str, str] | None = Field(
        None,
        description="held-out problems; null: none | same forms as train | a known set (math500, minerva,"
        " olympiadbench, gsm8k, aime24, aime25, amc23) | NAME=SOURCE: such a set from this file or hub data set"
        " | several: a list of these, or {NAME: SOURCE}",
    )
    eval_split: str = Field("test", description="of a hub data set that is not a known one")
    eval_limit: int | None = Field(None, ge=1, description="use the first N problems of each set")
    subset: str | None = Field(None, description="configuration name of a hub data set, e.g. main")
    prompt_key: str = Field("question", description="column of the problem: a text, or messages with role and content")
    answer_key: str = Field(
        "answer", description="column of the reference answer (sft: the response); a.b is b in column a"
    )
    answer_pattern: str | None = Field(None, description="regular expression; its group 1 in the answer column counts")
    prompt_template: str = Field("{problem}", description="text of the user's turn")
    system_prompt: str | None = None
    chat_template: bool = Field(False, description="wrap the prompt in the tokenizer's chat template")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are dropped and counted")

    @property
    def eval_sets(self) -> list[EvalSet]:
        """What to evaluate on, in the order given."""
        return eval_sets(self.eval)

    @field_validator("eval", mode="before")
    @classmethod
    def _evaluation_sets_have_names(cls, value: Any) -> Any:
        chosen = list(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        texts = [text for part in chosen for text in (part if isinstance(part, tuple) else [part])]
        if value is not None and (not texts or not all(isinstance(text, str) and text for text in texts)):
            raise ValueError("expected a data set, a list of them, or {name: source}")
        names = [one.name for one in eval_sets(value)]
        if wrong := [name for name in names if name == "mean" or not re.fullmatch(r"[\w.-]+", name)]:
            raise ValueError(f"{wrong[0]} can't be the name of a set; use letters, digits, _, - and ., and not mean")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is given twice; name them apart, e.g. {twice[0]}_b=SOURCE")
        return value

    @field_validator("eval")
    @classmethod
    def _home_is_expanded(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: expanduser(source) for name, source in value.items()}
        return [_expanded(text) for text in value] if isinstance(value, list) else value and _expanded(value)

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from error
            if groups < 1:
                raise ValueError("needs one group, e.g. '#### (.*)'")
        return pattern

    @field_validator("prompt_template")
    @classmethod
    def _template_has_problem(cls, template: str) -> str:
        if "{problem}" not in template:
            raise ValueError("must contain {problem}")
        return template


class RolloutConfig(Section):
    """Generation with vLLM."""

    engines: int = Field(1, ge=1, description="vLLM engines, each a process of its own; they take turns on the nodes")
    placement: Literal["colocated", "disaggregated", "ray"] = Field(
        "colocated",
        description="engines on the GPUs of the ranks, where they sleep while the learner works (unless "
        "schedule.max_staleness has them generate then); on other GPUs of the ranks' nodes; or on the nodes of a Ray "
        "cluster (RAY_ADDRESS)",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per engine")
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off")
    allow_truncated_sampling: bool = Field(False, description="accept top_p < 1 or top_k > 0 with importance ratios")
    max_response_tokens: int = Field(1024, ge=1)
    max_sequences: int = Field(256, ge=1, description="sequences one engine decodes at a time")
    gpu_memory_utilization: float = Field(0.4, gt=0, lt=1, description="share of a GPU for an engine (GPU only)")
    enforce_eager: bool = Field(
        False, description="no CUDA graphs: ready up to a minute sooner, slower to generate (GPU only)"
    )
    kv_cache_gib: int = Field(1, ge=1, description="KV cache of an engine (CPU only)")
    weight_update: Literal["drain", "in_flight"] = Field(
        "drain",
        description="with schedule.max_staleness: new weights wait for the responses that are being generated, or "
        "interrupt them (in_flight), which go on with them",
    )
    stall_seconds: float = Field(
        300, gt=0, description="an engine that is at work and silent for so long is killed and started again"
    )
    bucket_mib: int = Field(256, ge=1, description="weights travel in buckets of about this size")
    verify_every: int = Field(
        50,
        ge=0,
        description="weight updates between two checks that an engine holds what it was sent, tensor by tensor; 0: "
        "only when it has started",
    )
    damaged_weights: Literal["end", "reload"] = Field(
        "end",
        description="where such a check fails: the run ends; or it says so, sends the weights again and goes on, "
        "though what was sampled since the check before may come from damaged weights",
    )
    max_logprob_difference: float | None = Field(
        None, gt=0, description="stop when mean |log-prob| differs more between engine and learner; null: by precision"
    )


class RewardConfig(Section):
    """The verifier."""

    name: str = Field("math", description="math | countdown | format | module:function of yours")
    lenient: bool = Field(
        False, description="math: without a box, take the last expression, as the paper's grader does"
    )
    workers: int | None = Field(
        None, ge=1, description="processes for answers that need computer algebra; null: one for every four cores"
    )
    cpu_seconds: float = Field(2.0, gt=0, description="CPU time for one answer")
    memory_mib: int = Field(2048, ge=512, description="address space of a worker")
    recycle_after: int = Field(2000, ge=1, description="answers that a worker checks before a fresh one replaces it")

    @field_validator("name")
    @classmethod
    def _reward_exists(cls, name: str) -> str:
        if name not in REWARDS and not FUNCTION.fullmatch(name):
            raise ValueError(f"there is {', '.join(REWARDS)}, or a function of yours as module:function")
        return name

    @model_validator(mode="after")
    def _lenience_is_for_math(self) -> RewardConfig:
        if self.lenient and self.name != "math":
            raise UserError(f"reward.lenient=true is for reward.name=math, not for {self.name}; use false")
        return self


class ScheduleConfig(Section):
    """How much is sampled and how often the policy moves per step."""

    prompts_per_step: int = Field(1024, ge=1)
    samples_per_prompt: int = Field(4, ge=1)
    minibatch_prompts: int | None = Field(
        None, ge=1, description="prompts per optimizer update; null: all of the step's"
    )
    epochs: int = Field(1, ge=1, description="passes over a step's samples")
    max_staleness: int = Field(
        0,
        ge=0,
        description="steps that generation may run ahead of learning; 0: every sample is by the policy that learns",
    )
    partial_rollouts: int | None = Field(
        None,
        ge=1,
        description="tokens after which a new version of the weights needn't wait for a response to be finished: it "
        "goes on with them; null: every response is of one version, or see rollout.weight_update",
    )


class OptimConfig(Section):
    """AdamW."""

    lr: float = Field(1e-6, ge=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="cosine ends at this fraction of lr")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="maximum gradient norm")


class CriticConfig(Section):
    """The value model of baseline=critic; what is not here is as in optim."""

    lr: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    head_start_steps: int = Field(0, ge=0, description="first steps, in which only the critic learns")


class LearnerConfig(Section):
    """How the policy is spread over ranks and how a batch becomes micro-batches."""

    world_size: int | None = Field(None, ge=1, description="ranks; null: the launcher's, or all GPUs, or TP x PP")
    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    packing: bool = Field(True, description="pack sequences without padding; false: pad each micro-batch")
    micro_batch_tokens: int = Field(16384, ge=1, description="tokens per micro-batch (padding counts)")
    share_prompts: Literal["auto", True, False] = Field(
        "auto",
        description="compute a prompt once for all of its responses in a micro-batch; auto: where the attention can "
        "and it saves tokens",
    )
    fp32_logits: bool = Field(
        True, description="logits as exact as the products; false: rounded to bf16 where the model is, and faster"
    )
    recompute: Literal["none", "full"] = Field("none", description="recompute activations in the backward pass")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="what goes to the host's memory while colocated engines generate: optimizer state and gradients; "
        "or the weights too",
    )

    @model_validator(mode="after")
    def _world_size_factors(self) -> LearnerConfig:
        self.data_parallel_size(self.world_size or self.model_parallel_size)
        return self

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` ranks."""
        size = self.model_parallel_size
        if world_size % size:
            lower, upper = world_size // size * size, (world_size // size + 1) * size
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise UserError(
                f"learner.world_size={world_size} is not a multiple of tensor_model_parallel_size x "
                f"pipeline_model_parallel_size = {size}; use {nearest} ranks"
            )
        return world_size // size


class EvalConfig(Section):
    """avg@k and pass@k on held-out prompts."""

    samples_per_prompt: int = Field(8, ge=1, description="k")
    temperature: float = Field(1.0, ge=0, le=2)
    max_response_tokens: int | None = Field(None, ge=1, description="null: as in rollout")
    problems_per_batch: int = Field(
        64, ge=1, description="megarl eval saves the results of so many problems at a time, and goes on behind them"
    )


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    setting: Literal["none", "paper", "minimal_rl"] = Field(
        "none", description="published values for the keys that are not given: of the paper, or of its scripts"
    )
    recipe: Recipe = RECIPES[DEFAULT_RECIPE]
    schedule: ScheduleConfig = ScheduleConfig()
    optim: OptimConfig = OptimConfig()
    critic: CriticConfig = CriticConfig()
    learner: LearnerConfig = LearnerConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        for contradiction in contradictions(self):
            raise UserError(contradiction)
        return self

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one step when no mini-batch is filtered away."""
        prompts = self.schedule.prompts_per_step
        return self.schedule.epochs * -(-prompts // (self.schedule.minibatch_prompts or prompts))

    @property
    def critic_optim(self) -> OptimConfig:
        return self.optim.model_copy(update={"lr": self.critic.lr, "warmup_steps": self.critic.warmup_steps})

    @property
    def engines_sleep(self) -> bool:
        """Whether engines and learner take turns with their GPUs."""
        return self.rollout.placement == "colocated" and not self.schedule.max_staleness

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + max(self.rollout.max_response_tokens, self.eval.max_response_tokens or 0)


def _expanded(text: str) -> str:
    """SOURCE or NAME=SOURCE with the home folder in place of ~."""
    name, equals, source = text.partition("=")
    return f"{name}={expanduser(source)}" if equals and not text.startswith("~") else expanduser(text)


def eval_sets(value: str | list[str] | dict[str, str] | None) -> list[EvalSet]:
    """data.eval as sets. A bare name that no file or hub data set could have is a known set's."""
    if isinstance(value, dict):
        return [EvalSet(name, source, True) for name, source in value.items()]
    sets = []
    for text in [value] if isinstance(value, str) else value or []:
        name, equals, source = text.partition("=")
        if equals and re.fullmatch(r"[\w.-]+", name) and source:
            sets.append(EvalSet(name, source, True))
        elif re.fullmatch(r"[a-z0-9]+", text):
            sets.append(EvalSet(text, text, text != "arithmetic"))
        else:
            sets.append(EvalSet(_set_name(text), text, False))
    return sets


def _set_name(source: str) -> str:
    """Of a file, folder or hub data set its last part; of a pattern what it leaves fixed, else its folder."""
    path = Path(source)
    name = path.name.removesuffix(".jsonl").removesuffix(".parquet")
    if not re.search(r"[*?[]", name):
        return name
    return re.sub(r"\[.*?\]|[*?]", "", name).strip("-_.") or path.parent.name
