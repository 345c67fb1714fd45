"""Small wrongs done to `megarl.algorithms` and its ops, each of which a comparison with the definitions must notice.

`python tests/algorithms/mutations.py` prints the list with the first case that caught each.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from test_reference import check

MEGARL = Path(__file__).parents[2] / "megarl"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str  # occurs once in the file
    new: str


MUTATIONS = [
    # which samples count
    Mutation(
        "rewards always 0/1",
        "credit.py",
        "recipe.wrong_reward + score.double() * (1 - recipe.wrong_reward)",
        "score.double()",
    ),
    Mutation(
        "rewards always ±1",
        "credit.py",
        "recipe.wrong_reward + score.double() * (1 - recipe.wrong_reward)",
        "2 * score.double() - 1",
    ),
    Mutation(
        "0/1 and ±1 swapped",
        "credit.py",
        "recipe.wrong_reward + score.double() * (1 - recipe.wrong_reward)",
        "-1 - recipe.wrong_reward + score.double() * (2 + recipe.wrong_reward)",
    ),
    Mutation("Reinforce recipes with 0/1", "recipes.py", '{"wrong_reward": -1.0}', '{"wrong_reward": 0.0}'),
    Mutation("DAPO with 0/1", "recipes.py", 'name="dapo",\n            **_PM1,', 'name="dapo",'),
    Mutation("remove and zero swapped", "credit.py", 'if recipe.dropped == "remove"', 'if recipe.dropped == "zero"'),
    Mutation("minimal_rl removes", "recipes.py", '"dropped": "zero"', '"dropped": "remove"'),
    Mutation(
        "dropped samples keep their advantage", "credit.py", "torch.where(learned, advantages, 0.0)", "advantages"
    ),
    Mutation("all_wrong drops all-correct groups", "credit.py", "(right == 0)", "(right == count)"),
    Mutation("all_correct drops all-wrong groups", "credit.py", "(right == count)", "(right == 0)"),
    Mutation(
        "all_wrong and all_correct swapped",
        "credit.py",
        "right, count = groups.sum(correct)",
        "right, count = groups.sum(~correct)",
    ),
    Mutation(
        "group filter both drops all-wrong only", "credit.py", 'in ("all_correct", "both")', 'in ("all_correct",)'
    ),
    Mutation("positive keeps the wrong", "credit.py", "dropped | ~correct", "dropped | correct"),
    Mutation("invalid samples take part in statistics", "credit.py", "values.double() * self.valid", "values.double()"),
    Mutation(
        "overlong=mask ignored",
        "credit.py",
        'return recipe.overlong == "mask" and sample.truncated',
        "return False",
    ),
    Mutation(
        "masked samples leave the statistics",
        "credit.py",
        "Groups(prompt_ids, valid)",
        "Groups(prompt_ids, valid & ~masked)",
    ),
    Mutation("masked samples count with advantage 0", "credit.py", "else valid & ~masked", "else valid"),
    Mutation(
        "soft penalty starts at the limit",
        "credit.py",
        "(limit - cache - lengths.double())",
        "(limit - lengths.double())",
    ),
    Mutation("soft penalty without a floor", "credit.py", ".clamp(-1, 0)", ".clamp(max=0)"),
    Mutation(
        "soft penalty as a bonus",
        "credit.py",
        "(limit - cache - lengths.double()) / cache",
        "-(limit - cache - lengths.double()) / cache",
    ),
    # advantages
    Mutation(
        "group_std: ddof flipped",
        "credit.py",
        "self.sum(torch.ones_like(values)) - ddof",
        "self.sum(torch.ones_like(values)) - (1 - ddof)",
    ),
    Mutation("batch std: ddof flipped", "credit.py", "(total - ddof)", "(total - (1 - ddof))"),
    Mutation(
        "ddof 0 by default", "recipe.py", "std_ddof: Literal[0, 1] = Field(1", "std_ddof: Literal[0, 1] = Field(0"
    ),
    Mutation(
        "group_std without eps",
        "credit.py",
        "(groups.std(reward, recipe.std_ddof) + recipe.scale_eps)",
        "groups.std(reward, recipe.std_ddof).clamp(min=1e-12)",
    ),
    Mutation(
        "group_std over kept instead of valid",
        "credit.py",
        "(groups.std(reward",
        "(Groups(prompt_ids, learned).std(reward",
    ),
    Mutation(
        "mean over kept instead of valid",
        "credit.py",
        '"mean":\n        baseline = groups.mean(reward)',
        '"mean":\n        baseline = Groups(prompt_ids, learned).mean(reward)',
    ),
    Mutation("mean dropped", "credit.py", 'recipe.baseline == "mean"', 'recipe.baseline == "no"'),
    Mutation("leave_one_out divides by n", "credit.py", "others.clamp(min=1)", "(others + 1)"),
    Mutation("leave_one_out counts itself", "credit.py", "(groups.sum(reward) - reward)", "groups.sum(reward)"),
    Mutation(
        "leave_one_out: alone, the reward stays",
        "credit.py",
        "others.clamp(min=1), reward)",
        "others.clamp(min=1), 0.0)",
    ),
    Mutation(
        "length_mean without lengths",
        "credit.py",
        'groups.mean(reward, _given(tokens, "lengths"))',
        "groups.mean(reward)",
    ),
    Mutation(
        "pool_mean of the group only",
        "credit.py",
        "groups.mean(scores) if pool_rewards is None else pool_rewards",
        "groups.mean(scores)",
    ),
    Mutation(
        "pool_mean in 0/1",
        "credit.py",
        "worth(groups.mean(scores) if pool_rewards is None else pool_rewards)",
        "groups.mean(scores) if pool_rewards is None else pool_rewards",
    ),
    Mutation(
        "pool without the unused samples", "credit.py", "for sample in group.drawn if", "for sample in group.samples if"
    ),
    Mutation(
        "greedy in 0/1",
        "credit.py",
        'worth(_given(greedy_rewards, "greedy_rewards"))',
        '_given(greedy_rewards, "greedy_rewards")',
    ),
    Mutation("batch_token_mean over valid instead of kept", "credit.py", "* learned, ddof=0", "* valid, ddof=0"),
    Mutation(
        "batch_token_mean without lengths",
        "credit.py",
        '_mean_and_std(reward, _given(tokens, "lengths") * learned',
        "_mean_and_std(reward, learned.double()",
    ),
    Mutation(
        "batch_std over valid instead of kept",
        "credit.py",
        "weights = learned.double() if",
        "weights = valid.double() if",
    ),
    Mutation("batch_std by tokens", "credit.py", 'learned.double() if recipe.scale == "batch_std" else ', ""),
    Mutation(
        "batch_token_std by samples", "credit.py", 'if recipe.scale == "batch_std" else', 'if recipe.scale != "no" else'
    ),
    Mutation(
        "batch_std of rewards, not advantages",
        "credit.py",
        "_mean_and_std(advantages, weights",
        "_mean_and_std(reward, weights",
    ),
    Mutation(
        "group_mean divides by the deviation",
        "credit.py",
        "(groups.mean(reward) + recipe.scale_eps)",
        "(groups.std(reward, recipe.std_ddof) + recipe.scale_eps)",
    ),
    Mutation("DPO: chosen and rejected swapped", "credit.py", "= 1.0, -1.0", "= -1.0, 1.0"),
    Mutation("DPO: last instead of first correct", "credit.py", "pairs[best[0]]", "pairs[best[-1]]"),
    # the objective
    Mutation(
        "ppo: bad samples clipped above, too",
        "ops/rules.py",
        "above = good & (ratio > 1 + high)",
        "above = ratio > 1 + high",
    ),
    Mutation(
        "ppo: good samples clipped below, too",
        "ops/rules.py",
        "below = bad & (ratio < 1 - low)",
        "below = ratio < 1 - low",
    ),
    Mutation(
        "ppo: upper edge at clip_low",
        "ops/rules.py",
        "above = good & (ratio > 1 + high)",
        "above = good & (ratio > 1 + low)",
    ),
    Mutation(
        "ppo: lower edge at clip_high",
        "ops/rules.py",
        "below = bad & (ratio < 1 - low)",
        "below = bad & (ratio < 1 - high)",
    ),
    Mutation("ppo: no upper clip", "ops/rules.py", "above = good & (ratio > 1 + high)", "above = never"),
    Mutation("ppo: no lower clip", "ops/rules.py", "below = bad & (ratio < 1 - low)", "below = never"),
    Mutation(
        "ppo: held at the wrong height above",
        "ops/rules.py",
        "xp.where(above, (1 + high) * advantage",
        "xp.where(above, (1 + low) * advantage",
    ),
    Mutation(
        "ppo: held at the wrong height below",
        "ops/rules.py",
        "xp.where(below, (1 - low) * advantage",
        "xp.where(below, (1 - high) * advantage",
    ),
    Mutation(
        "ppo: the gradient is not clipped",
        "ops/rules.py",
        "xp.where(below | above, 0.0, by_ratio), below",
        "by_ratio, below",
    ),
    Mutation("the ratio's derivative forgets the ratio", "ops/rules.py", "0.0, ratio * advantage)", "0.0, advantage)"),
    Mutation("clip-higher dropped from RAFT++", "recipes.py", 'positive", **_PPO, clip_high=0.28', 'positive", **_PPO'),
    Mutation("dual clip dropped", "ops/rules.py", "if DUAL:", "if False:"),
    Mutation("dual clip: of small ratios", "ops/rules.py", "bad & (ratio > dual_clip)", "bad & (ratio < dual_clip)"),
    Mutation(
        "dual clip for positive advantages", "ops/rules.py", "bad & (ratio > dual_clip)", "good & (ratio > dual_clip)"
    ),
    Mutation("dual clip: the gradient goes on", "ops/rules.py", "above = above | far", "above = above"),
    Mutation("dual clip at 4 in minimal_rl", "recipes.py", '"dual_clip": 3.0', '"dual_clip": 4.0'),
    Mutation(
        "cispo: ratio not detached",
        "ops/rules.py",
        "return weight * logprob, weight, advantage * 0.0, never, (good",
        "return weight * logprob, weight, weight * logprob, never, (good",
    ),
    Mutation(
        "cispo: cap at high, not 1 + high",
        "ops/rules.py",
        "xp.where(above, 1 + high, ratio)",
        "xp.where(above, high, ratio)",
    ),
    Mutation(
        "cispo: clipped below, too",
        "ops/rules.py",
        "xp.where(above, 1 + high, ratio)",
        "xp.where(above, 1 + high, xp.where(ratio < 1 - low, 1 - low, ratio))",
    ),
    Mutation("ScaleRL capped at 6", "recipes.py", "clip_high=4.0", "clip_high=5.0"),
    Mutation(
        "ScaleRL against the trainer's old policy",
        "recipes.py",
        'old_policy="rollout",\n            clip="cispo"',
        'clip="cispo"',
    ),
    Mutation(
        "dppo against the trainer's old policy",
        "recipes.py",
        'old_policy="rollout",\n            clip="dppo_tv"',
        'clip="dppo_tv"',
    ),
    Mutation(
        "dppo divides by the deviation",
        "recipes.py",
        'name="dppo",\n            baseline="mean"',
        'name="dppo",\n            **_GRPO',
    ),
    Mutation(
        "dppo: ratio not detached",
        "ops/rules.py",
        "return weight * logprob, weight, advantage * 0.0, below",
        "return weight * logprob, weight, weight * logprob, below",
    ),
    Mutation("dppo: ratio not truncated", "ops/rules.py", "xp.where(ratio > ratio_cap, ratio_cap, ratio)", "ratio"),
    Mutation("dppo: thresholds swapped", "ops/rules.py", "(moved < -low)", "(moved < -high)"),
    Mutation(
        "dppo: masked against the advantage",
        "ops/rules.py",
        "above = good & (moved > high)",
        "above = bad & (moved > high)",
    ),
    Mutation("dppo: held tokens still learn", "ops/rules.py", "xp.where(below | above, 0.0, weight)", "weight"),
    Mutation(
        "token_log: sides swapped",
        "loss.py",
        "torch.where(advantages > 0, capped, raised)",
        "torch.where(advantages > 0, raised, capped)",
    ),
    Mutation("token_log: clip dropped", "loss.py", "torch.where(advantages > 0, capped, raised)", "log_ratio"),
    Mutation("sapo: temperatures swapped", "ops/rules.py", "tau = xp.where(good,", "tau = xp.where(bad,"),
    Mutation(
        "sapo: no temperature in the gate", "ops/rules.py", "xp.sigmoid(tau * (ratio - 1))", "xp.sigmoid(ratio - 1)"
    ),
    Mutation("sapo: gate not normalised", "ops/rules.py", "return 4 / tau * gate", "return gate"),
    Mutation("sapo: the gate's slope", "ops/rules.py", "gate * (1 - gate) * by_ratio", "gate * by_ratio"),
    Mutation(
        "sequence ratio: sum instead of mean",
        "loss.py",
        "log_ratio = sequence_mean(log_ratio, mask, sequence)",
        "log_ratio = sequence_sum(log_ratio * mask, sequence)",
    ),
    Mutation(
        "sequence ratio by token",
        "loss.py",
        "log_ratio = sequence_mean(log_ratio, mask, sequence)",
        "log_ratio = log_ratio",
    ),
    Mutation(
        "ratio upside down",
        "loss.py",
        "log_ratio, advantages = logprobs - old,",
        "log_ratio, advantages = old - logprobs,",
    ),
    Mutation(
        "old log-probs not detached", "loss.py", "old_logprobs=old.reshape(-1).detach()", "old_logprobs=old.reshape(-1)"
    ),
    Mutation(
        "old_policy=rollout ignored",
        "loss.py",
        'rollout_logprobs if recipe.old_policy == "rollout" else old_logprobs',
        "old_logprobs",
    ),
    Mutation("log-ratios not limited", "ops/rules.py", "LOG_RATIO_LIMIT = 20.0", "LOG_RATIO_LIMIT = 40.0"),
    Mutation("objective minimised", "ops/reference.py", "scale = -weights if", "scale = weights if"),
    # mismatch of rollout and trainer
    Mutation("mismatch weights not applied", "ops/reference.py", "-weights * correction", "-weights"),
    Mutation(
        "mismatch weights on KL, too",
        "ops/reference.py",
        "loss, by_logprob = loss + rule.kl_coef * kl * weights,",
        "loss, by_logprob = loss + rule.kl_coef * kl * weights * (1 if correction is None else correction),",
    ),
    Mutation(
        "mismatch upside down", "mismatch.py", "(old_logprobs - rollout_logprobs)", "(rollout_logprobs - old_logprobs)"
    ),
    Mutation("tis: not truncated", "mismatch.py", "ratio.clamp(max=high) * mask", "ratio * mask"),
    Mutation(
        "tis: truncated below, too", "mismatch.py", "ratio.clamp(max=high) * mask", "ratio.clamp(low, high) * mask"
    ),
    Mutation("seq_tis by token", "mismatch.py", '("seq_tis", "seq_reject"):', '("seq_reject",):'),
    Mutation("icepop without mask", "mismatch.py", "ratio * inside * mask", "ratio * mask"),
    Mutation("icepop without ratio", "mismatch.py", "ratio * inside * mask", "inside * mask"),
    Mutation("nothing too low", "mismatch.py", "((ratio >= low) & (ratio <= high))", "(ratio <= high)"),
    Mutation("nothing too high", "mismatch.py", "((ratio >= low) & (ratio <= high))", "(ratio >= low)"),
    Mutation(
        "geo_reject by sum",
        "mismatch.py",
        "log_ratio = sequence_mean(log_ratio, mask, sequence)",
        "log_ratio = sequence_sum(log_ratio, sequence)",
    ),
    Mutation(
        "rejected responses stay in the denominator",
        "loss.py",
        "flat_mask = flat_mask * correction",
        "flat_mask = flat_mask * 1",
    ),
    Mutation("geo_reject with the bounds of a sum", "recipe.py", "(0.999, 1.001)", "(0.5, 2.0)"),
    Mutation("icepop rejects from 2 on", "recipe.py", "(0.5, 5.0)", "(0.5, 2.0)"),
    # aggregation
    Mutation(
        "token_mean as seq_mean_token_sum",
        "loss.py",
        'recipe.aggregation == "token_mean"',
        'recipe.aggregation == "no"',
    ),
    Mutation(
        "seq_mean_token_mean as token_mean",
        "loss.py",
        'recipe.aggregation == "token_mean"',
        'recipe.aggregation in ("token_mean", "seq_mean_token_mean")',
    ),
    Mutation(
        "seq_mean_token_mean as seq_mean_token_sum",
        "loss.py",
        "weights = weights / counted",
        "pass",
    ),
    Mutation(
        "seq_mean_token_sum as token_mean",
        "loss.py",
        'recipe.aggregation == "token_mean"',
        'recipe.aggregation in ("token_mean", "seq_mean_token_sum")',
    ),
    Mutation(
        "seq_mean_token_sum_norm as seq_mean_token_sum",
        "loss.py",
        "weights = weights / max_response_tokens",
        "pass",
    ),
    Mutation(
        "seq_mean_token_sum_norm as seq_mean_token_mean",
        "loss.py",
        'recipe.aggregation == "seq_mean_token_mean"',
        'recipe.aggregation in ("seq_mean_token_mean", "seq_mean_token_sum_norm")',
    ),
    Mutation(
        "prompt_mean_token_mean as seq_mean_token_mean",
        "loss.py",
        "weights = 1 / answered / sequence_sum(tokens.double(), index)",
        "weights = 1 / max(int(present.sum()), 1) / counted",
    ),
    Mutation(
        "prompt_mean_token_mean: sums within prompts",
        "loss.py",
        "weights = 1 / answered / sequence_sum(tokens.double(), index).clamp(min=1)",
        "weights = torch.full_like(counted, 1 / answered)",
    ),
    Mutation(
        "MaxRL averages a response",
        "recipes.py",
        'scale="group_mean", aggregation="seq_mean_token_sum"',
        'scale="group_mean"',
    ),
    Mutation("empty prompts counted", "loss.py", "index[tokens > 0].unique()", "index.unique()"),
    Mutation("empty sequences counted", "loss.py", "max(int(present.sum()), 1)", "len(present)"),
    Mutation("token_mean by default", "recipe.py", 'Field("seq_mean_token_mean"', 'Field("token_mean"'),
    Mutation(
        "minimal_rl by sequence",
        "recipes.py",
        '"minimal_rl": {\n        "aggregation": "token_mean"',
        '"minimal_rl": {\n        "aggregation": "seq_mean_token_mean"',
    ),
    # regularisers
    Mutation("GRPO with a KL by its text", "recipes.py", "**_GRPO, **_PPO)", "**_GRPO, **_PPO, kl_coef=0.001)"),
    Mutation("minimal_rl: GRPO without a KL", "recipes.py", '"raft_pp", "grpo", ', '"raft_pp", '),
    Mutation("minimal_rl: PPO with a KL", "recipes.py", '"raft_pp", "grpo", ', '"raft_pp", "grpo", "ppo", '),
    Mutation(
        "minimal_rl: a KL for all", "recipes.py", '"entropy_coef": 0.001,', '"entropy_coef": 0.001, "kl_coef": 0.001,'
    ),
    Mutation(
        "KL the other way round",
        "ops/rules.py",
        "log_ratio = logprob - ref_logprob",
        "log_ratio = ref_logprob - logprob",
    ),
    Mutation("KL as a bonus", "ops/reference.py", "loss + rule.kl_coef", "loss - rule.kl_coef"),
    Mutation("KL's gradient as a bonus", "ops/reference.py", "by_logprob + rule.kl_coef", "by_logprob - rule.kl_coef"),
    Mutation(
        "k1 with its own gradient", "ops/rules.py", "return log_ratio, log_ratio", "return log_ratio, 1 + log_ratio * 0"
    ),
    Mutation(
        "k2 without the half", "ops/rules.py", "return 0.5 * log_ratio * log_ratio", "return log_ratio * log_ratio"
    ),
    Mutation(
        "k2's gradient doubled",
        "ops/rules.py",
        "log_ratio * log_ratio, log_ratio",
        "log_ratio * log_ratio, 2 * log_ratio",
    ),
    Mutation("k3: sign of the log-ratio", "ops/rules.py", "return ratio - inverse - 1", "return ratio + inverse - 1"),
    Mutation("k3: log-ratio upside down", "ops/rules.py", "inverse = -log_ratio\n", "inverse = log_ratio\n"),
    Mutation("k3: gradient's sign", "ops/rules.py", "xp.where(held, 0.0, 1 - ratio)", "xp.where(held, 0.0, ratio - 1)"),
    Mutation(
        "k3: not clamped",
        "ops/rules.py",
        "xp.where(held, log_ratio_limit, inverse)",
        "inverse",
    ),
    Mutation("k3: a slope beyond the clamp", "ops/rules.py", "xp.where(held, 0.0, 1 - ratio)", "1 - ratio"),
    Mutation(
        "k3: no slope far above the reference",
        "ops/rules.py",
        "xp.where(held, 0.0, 1 - ratio)",
        "xp.where(held | (inverse < -log_ratio_limit), 0.0, 1 - ratio)",
    ),
    Mutation(
        "k3: clamped far above the reference",
        "ops/rules.py",
        "return ratio - inverse - 1",
        "return ratio - xp.where(inverse < -log_ratio_limit, -log_ratio_limit, inverse) - 1",
    ),
    Mutation("entropy punished", "ops/reference.py", "loss - rule.entropy_coef", "loss + rule.entropy_coef"),
    Mutation("entropy's gradient punishes", "ops/epilogue.py", "else -rule.entropy_coef", "else rule.entropy_coef"),
    Mutation("proximal term without the half", "loss.py", "0.5 * recipe.proximal_coef", "recipe.proximal_coef"),
    Mutation(
        "proximal term as a bonus",
        "loss.py",
        "total + 0.5 * recipe.proximal_coef",
        "total - 0.5 * recipe.proximal_coef",
    ),
    Mutation(
        "proximal: mean over a sequence, not sum",
        "loss.py",
        "return (total**2 * share)",
        "return (total**2 * share**3)",
    ),
    Mutation("proximal: a square for every token", "loss.py", "(total**2 * share)", "(total**2 * tokens.mask)"),
    Mutation(
        "proximal: levels swapped", "loss.py", 'recipe.proximal_level == "token"', 'recipe.proximal_level == "sequence"'
    ),
    # the critic
    Mutation(
        "GAE: value off by one",
        "gae.py",
        "recipe.gamma * later_value[:longer] - value[here]",
        "recipe.gamma * value[here] - value[here]",
    ),
    Mutation("GAE: reward at the first token", "gae.py", "received[last[", "received[(last - lengths + 1)["),
    Mutation("GAE: lambda dropped", "gae.py", "recipe.gamma * recipe.gae_lambda *", "recipe.gamma *"),
    Mutation("GAE: gamma dropped", "gae.py", "recipe.gamma * recipe.gae_lambda *", "recipe.gae_lambda *"),
    Mutation("returns without values", "gae.py", "advantages + values, 0.0", "advantages, 0.0"),
    Mutation("whitening: ddof flipped", "gae.py", "recipe.std_ddof)", "1 - recipe.std_ddof)"),
    Mutation("whitening: mean stays", "gae.py", "return (advantages - mean) /", "return advantages /"),
    Mutation(
        "value clip dropped",
        "gae.py",
        "torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)",
        "(values - returns) ** 2",
    ),
    Mutation("value clip: max to min", "gae.py", "torch.maximum(", "torch.minimum("),
    Mutation("value loss without the half", "gae.py", "return 0.5 * (", "return ("),
    Mutation(
        "value clip 0.2 by default", "recipe.py", "value_clip: float = Field(0.5", "value_clip: float = Field(0.2"
    ),
    # DPO
    Mutation(
        "DPO: sign of the margin",
        "pairwise.py",
        "tokens.advantages.sign() * log_ratio",
        "-tokens.advantages.sign() * log_ratio",
    ),
    Mutation("DPO: beta dropped", "pairwise.py", "recipe.dpo_beta * margin", "margin"),
    Mutation(
        "DPO: smoothing dropped",
        "pairwise.py",
        "smoothing, logit = recipe.label_smoothing, ",
        "smoothing, logit = 0.0, ",
    ),
    Mutation(
        "DPO: smoothing swapped",
        "pairwise.py",
        "(1 - smoothing) * F.logsigmoid(logit) + smoothing *",
        "smoothing * F.logsigmoid(logit) + (1 - smoothing) *",
    ),
    Mutation(
        "DPO: mean over sequences, not pairs",
        "loss.py",
        'if recipe.objective == "dpo":\n        weights = torch.full_like(counted, 1 / answered)',
        'if recipe.objective == "dpo":\n        weights = torch.full_like(counted, 1 / max(int(present.sum()), 1))',
    ),
]


@contextlib.contextmanager
def mutant(mutation: Mutation | None, name: str = "mutant") -> Iterator[str]:
    """A copy of the package under another name, with one mutation or none, importable meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        for part, place in ((MEGARL / "algorithms", copy), (MEGARL / "ops", copy / "ops")):
            shutil.copytree(part, place, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            file = copy / mutation.file
            text = file.read_text()
            found = text.count(mutation.old)
            assert found == 1, (
                f"mutation {mutation.name!r}: {mutation.file} has its text {found} times, not once; "
                f"adapt it in {Path(__file__).name}: {mutation.old!r}"
            )
            file.write_text(text.replace(mutation.old, mutation.new))
        for file in copy.rglob("*.py"):
            renamed = file.read_text().replace("megarl.algorithms", name).replace("megarl.ops", f"{name}.ops")
            file.write_text(renamed)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            importlib.import_module(name)
            yield name
        finally:
            sys.path.remove(folder)
            for module in [m for m in sys.modules if m.split(".")[0] == name]:
                del sys.modules[module]


def main() -> None:
    assert not list(check()), "the package itself disagrees with the definitions; nothing can be said of its mutations"
    print("| mutation | file | caught by |\n| --- | --- | --- |")
    for mutation in MUTATIONS:
        with mutant(mutation) as package:
            caught = next(check(package, mutation.file), "NOTHING").split(": ")[0]
        print(f"| {mutation.name} | {mutation.file} | {caught} |", flush=True)


if __name__ == "__main__":
    main()
