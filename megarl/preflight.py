"""Everything about a run that can be refused before a rank starts: model, layout, data, run folder."""

from __future__ import annotations

import importlib.util
import os
import sys

from megarl.config import Config
from megarl.data.prompts import Splits, load_splits
from megarl.faults import check_shared_memory, has_bf16_products
from megarl.launcher import rank_count
from megarl.models.family import architecture, read_hf_config
from megarl.resume import check_inputs, check_run_folder
from megarl.types import UserError


def check_run(config: Config, command: str, resume: bool) -> Splits:
    """Raises UserError, naming the key or row and what would be legal; the problems that were checked."""
    check_run_folder(config, command, resume)
    check_precision(config)
    check_machine(config)
    check_model(config, command)
    check_gpu_memory(config, command)
    problems = check_data(config, command)
    check_reward(config, command, problems)
    check_prompts(config, command, problems)
    if resume:
        check_inputs(config, problems)
    return problems


def check_machine(config: Config) -> None:
    """Ranks and engines against the GPUs of this machine; without any, only the CPU's limits hold."""
    import torch

    from megarl.rollout.engine import engine_gpus

    check_shared_memory()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    size = config.rollout.tensor_parallel_size
    if size > max(gpus, 1):
        raise UserError(f"rollout.tensor_parallel_size={size} needs as many GPUs; this machine has {gpus}")
    if "RANK" not in os.environ:
        ranks = rank_count(config.learner, gpus)
        if gpus:
            engine_gpus(config, ranks)
    if config.rollout.placement == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("rollout.placement=ray needs ray: pip install 'megarl[cluster]', or set it to colocated")
    if config.run.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("run.wandb_project is set but wandb is not installed; pip install wandb, or set it to null")


def check_precision(config: Config) -> None:
    """fp8 is refused without the hardware, shared prompts where the precision's attention can't; bf16 runs anywhere, on
    a CPU without the instructions all too slowly."""
    import torch

    if config.model.precision == "fp8" or config.learner.share_prompts is True:  # this imports Megatron
        from megarl.learner.model import can_share_prompts, check_precision

        check_precision(config.model.precision)
        can_share_prompts(config.learner, config.model.precision)
    if config.model.precision == "bf16" and not (torch.cuda.is_available() or has_bf16_products()):
        print(
            "megarl: warning: model.precision=bf16: this CPU has no bf16 products (AMX or AVX-512), which take it up "
            "to a hundred times as long as fp32's; use fp32 here",
            file=sys.stderr,
        )


def check_model(config: Config, command: str) -> None:
    from megarl.data.tokenizer import check_stop_tokens, check_vocabulary, load_tokenizer
    from megarl.models.hugging_face import HuggingFaceFiles, model_files

    path, learner = config.model.path, config.learner
    hf_config = read_hf_config(path)
    arch, files = architecture(hf_config), HuggingFaceFiles(path)
    files.check_names(arch, path)
    if files.unread:
        print(f"megarl: model.path={path}: not part of the model, not read: {', '.join(files.unread)}", file=sys.stderr)
    for file in model_files(path):
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} can't be read, so it can't be saved with the trained model; see to it")
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, arch.vocab_size, path)
    if command != "sft":
        check_stop_tokens(tokenizer, hf_config, path)
    if command != "eval":
        arch.check_layout(learner.tensor_model_parallel_size, learner.pipeline_model_parallel_size)
    if config.max_sequence_tokens > arch.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_tokens + max_response_tokens (of rollout or eval) = {config.max_sequence_tokens} is more "
            f"than this model's {arch.max_position_embeddings} positions; lower one of them"
        )


def check_gpu_memory(config: Config, command: str) -> None:
    """Of colocated engines beside the learner, where this machine has GPUs."""
    import torch

    from megarl.gpu_budget import budget, check_budget
    from megarl.memory import GIB
    from megarl.rollout.engine import ranks_here

    if command != "train" or config.rollout.placement != "colocated" or not torch.cuda.is_available():
        return
    gpus = torch.cuda.device_count()
    if "RANK" in os.environ:
        ranks, here = int(os.environ["WORLD_SIZE"]), ranks_here()
    else:
        ranks = here = rank_count(config.learner, gpus)
    if here is None:  # and how many nodes share the engines can't be told
        return
    total = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)) / GIB
    arch = architecture(read_hf_config(config.model.path))
    check_budget(config, budget(config, arch, ranks, gpus * (ranks // here), total))


def check_data(config: Config, command: str) -> Splits:
    """Raises UserError for what can't be read; the problems of each split that the command uses."""
    problems = load_splits(config.data, command)
    if command != "eval" and config.schedule.prompts_per_step > len(problems["train"]):
        raise UserError(
            f"schedule.prompts_per_step={config.schedule.prompts_per_step} is more than the {len(problems['train'])} "
            f"rows of data.train={config.data.train}; use at most that"
        )
    return problems


def check_prompts(config: Config, command: str, problems: Splits) -> None:
    """What templates and tokenizer make of the problems, and of a response that the reward would accept.

    Warnings go to standard error.
    """
    from megarl.data import faithful
    from megarl.data.tokenizer import load_tokenizer
    from megarl.rollout.reading import Reader

    tokenizer = load_tokenizer(config.model.path)
    vocabulary = read_hf_config(config.model.path).vocab_size
    warnings = [
        warning
        for split in problems.values()
        for warning in faithful.check_prompts(
            config.data, split, tokenizer, vocabulary, with_responses=command == "sft"
        )
    ]
    if command != "sft":
        Reader(config, tokenizer).check(config)
    for warning in dict.fromkeys(warnings):
        print(f"megarl: warning: {warning}", file=sys.stderr)


def check_reward(config: Config, command: str, problems: Splits) -> None:
    """The user's function is imported in a worker as it will be in the run; countdown's references must be readable."""
    from megarl.rewards.countdown import parse_reference
    from megarl.rollout.sampler import reward_pool

    if command == "sft":
        return
    if ":" in config.reward.name:
        with reward_pool(config.reward) as pool:
            pool.check()
    if config.reward.name == "countdown":
        for split, members in problems.items():
            for problem in members:
                try:
                    parse_reference(problem.answer)
                except ValueError as error:
                    raise UserError(f"{problem.id} (data.{split}): {error}") from None
