"""What is sampled for a step: refilling, adaptive sampling and greedy responses, with verdicts known in advance."""

import asyncio
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megarl.algorithms.credit import is_filtered
from megarl.config import parse_config
from megarl.data.prompts import PromptSet
from megarl.rollout.rounds import sample_step
from megarl.rollout.sampler import training_sampling
from megarl.types import Prompt, RewardStatus, Sample, SampleGroup

VERDICTS = {"c": "correct", "w": "wrong", "n": "no_answer", "t": "truncated", "o": "timeout", "e": "error"}


class KnownVerdicts:
    """Samples without an engine: `verdict` of prompt id and sample index is a letter of VERDICTS."""

    def __init__(self, verdict: Callable[[str, int], str]) -> None:
        self.verdict = verdict
        self.draws: list[tuple] = []  # (seed, prompt ids, indices, sampling) of each call

    async def sample(self, prompts, n, sampling, seed, first=0, **_):
        indices = range(first, first + n)
        self.draws.append((seed, [prompt.id for prompt in prompts], list(indices), sampling))
        return [SampleGroup(prompt, [self._sample(prompt, i, sampling) for i in indices]) for prompt in prompts]

    def _sample(self, prompt, index, sampling):
        letter = self.verdict(prompt.id, index)
        return Sample(
            index=index,
            response_ids=np.array([int(prompt.id), index], np.int32),
            rollout_logprobs=np.zeros(2, np.float32),
            text=f"{prompt.id}/{index} at {sampling.temperature:g}",
            finish_reason="length" if letter == "t" else "stop",
            weight_versions=np.zeros(2, np.int32),
            status=RewardStatus(VERDICTS[letter]),
        )


class Steps:
    """Steps of a configuration over prompts with ids "0" to "29"."""

    def __init__(self, recipe, verdict, *, n=4, prompts_per_step=6, prompts=30) -> None:
        self.sampler = KnownVerdicts(verdict)
        self.config = parse_config(
            {
                "model": {"path": "unused"},
                "data": {"train": "arithmetic"},
                "recipe": recipe,
                "schedule": {"prompts_per_step": prompts_per_step, "samples_per_prompt": n},
            }
        )
        self.prompts = PromptSet(
            [Prompt(str(i), "", np.zeros(1, np.int32), "", "test") for i in range(prompts)], dropped=0
        )

    def sample(self, step):
        return asyncio.run(sample_step(self.config, self.prompts, step, self.sampler.sample))


def letters(samples):
    of_status = {status: letter for letter, status in VERDICTS.items()}
    return "".join(of_status[sample.status] for sample in samples)


def contents(rollout):
    """All that a rollout holds, to compare."""

    def of_samples(samples):
        return [(s.index, s.text, s.status) for s in samples]

    return [
        [(g.prompt.id, of_samples(g.samples), of_samples(g.unused), g.greedy and g.greedy.text) for g in groups]
        for groups in (rollout.groups, rollout.replaced)
    ]


def ids(groups):
    return [group.prompt.id for group in groups]


def number_of_samples_that_repeat(sampler):
    """Samples of the same random numbers: those of one seed, prompt and index."""
    drawn = Counter(
        (seed, prompt, i) for seed, prompts, indices, _ in sampler.draws for prompt in prompts for i in indices
    )
    return sum(count - 1 for count in drawn.values())


def test_without_backfill_every_prompt_of_the_step_is_sampled_once():
    steps = Steps("reinforce_rej", lambda prompt, i: "w")
    rollout = steps.sample(2)
    assert ids(rollout.groups) == [p.id for p in steps.prompts.at_step(2, 6, 0)] and rollout.replaced == []
    assert all([s.index for s in group.samples] == [0, 1, 2, 3] for group in rollout.groups)
    assert all(group.unused == [] and group.greedy is None for group in rollout.groups)
    (draw,) = steps.sampler.draws
    assert draw == (("step", 2), ids(rollout.groups), [0, 1, 2, 3], training_sampling(steps.config))


# ---- resample --------------------------------------------------------------------------------------------------------


def resampling(**fields):
    return {"name": "x", "base": "none", "backfill": "resample", "group_filter": "both", **fields}


def every_third_is_mixed(prompt, index):
    """Prompts 0, 3, 6, ... are mixed, 1, 4, 7, ... all correct, 2, 5, 8, ... all wrong."""
    return ("cw"[index % 2], "c", "w")[int(prompt) % 3]


def test_filtered_groups_are_replaced_by_fresh_prompts_in_their_slots():
    steps = Steps(resampling(backfill_rounds=30), every_third_is_mixed)
    first = [p.id for p in steps.prompts.at_step(1, 6, 0)]
    assert {int(i) % 3 for i in first} == {0, 1, 2}, "the case is too easy"
    rollout = steps.sample(1)
    for before, group in zip(first, rollout.groups, strict=True):
        assert int(group.prompt.id) % 3 == 0 and len(group.samples) == 4
        assert group.prompt.id == before or int(before) % 3 != 0
    assert rollout.replaced and all(is_filtered(steps.config.recipe, group) for group in rollout.replaced)
    assert {i for i in first if int(i) % 3} <= set(ids(rollout.replaced))


@pytest.mark.parametrize("group_filter", ["all_wrong", "all_correct", "both"])
def test_only_what_the_recipe_filters_is_replaced(group_filter):
    steps = Steps(resampling(group_filter=group_filter, backfill_rounds=30), every_third_is_mixed)
    rollout = steps.sample(0)
    dropped = {"all_wrong": {2}, "all_correct": {1}, "both": {1, 2}}[group_filter]
    assert {int(i) % 3 for i in ids(rollout.replaced)} == dropped
    assert not {int(i) % 3 for i in ids(rollout.groups)} & dropped


def test_groups_without_a_verdict_are_replaced():
    steps = Steps(resampling(), lambda prompt, i: "oe"[i % 2] if int(prompt) % 2 else "cw"[i % 2])
    rollout = steps.sample(0)
    assert rollout.replaced and all(int(i) % 2 for i in ids(rollout.replaced))


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 10])
def test_no_prompt_is_drawn_twice_in_a_step_and_none_is_lost(step, rounds):
    steps = Steps(resampling(backfill_rounds=rounds), every_third_is_mixed)
    rollout = steps.sample(step)
    drawn = [prompt for _, prompts, *_ in steps.sampler.draws for prompt in prompts]
    assert len(drawn) == len(set(drawn))
    assert sorted(drawn) == sorted(ids(rollout.groups) + ids(rollout.replaced))
    assert len(rollout.groups) == 6
    assert number_of_samples_that_repeat(steps.sampler) == 0


@pytest.mark.parametrize(("rounds", "replaced"), [(1, 0), (2, 6), (3, 12), (4, 18), (5, 24), (6, 24)])
def test_resampling_stops_after_its_rounds_or_when_no_prompt_is_left(rounds, replaced):
    steps = Steps(resampling(backfill_rounds=rounds), lambda prompt, i: "w")
    rollout = steps.sample(0)
    assert len(rollout.groups) == 6 and len(rollout.replaced) == replaced
    assert len(steps.sampler.draws) == 1 + replaced // 6


def test_the_last_prompts_fill_the_first_slots():
    steps = Steps(resampling(backfill_rounds=4), lambda prompt, i: "w", prompts=8)
    rollout = steps.sample(0)
    first = [p.id for p in steps.prompts.at_step(0, 6, 0)]
    assert set(ids(rollout.groups)[:2]) == {str(i) for i in range(8)} - set(first)
    assert ids(rollout.groups)[2:] == first[2:] and ids(rollout.replaced) == first[:2]


def test_resampling_draws_no_more_once_nothing_is_filtered():
    steps = Steps(resampling(backfill_rounds=10), lambda prompt, i: "cw"[i % 2])
    assert steps.sample(0).replaced == [] and len(steps.sampler.draws) == 1


# ---- adaptive --------------------------------------------------------------------------------------------------------


def adaptive(**fields):
    return {"name": "x", "base": "none", "backfill": "adaptive", "baseline": "pool_mean", **fields}


def one_group(verdicts, n, **fields):
    """The group of a prompt whose samples have these verdicts, in order of index."""
    steps = Steps(adaptive(**fields), lambda prompt, i: verdicts[i], n=n, prompts_per_step=1)
    (group,) = steps.sample(0).groups
    return group


@pytest.mark.parametrize(
    ("n", "verdicts", "chosen", "unused"),
    [
        # Balanced at once.
        (4, "cwcw", "ccww", ""),
        (5, "ccwww", "ccwww", ""),
        (3, "cwc", "ccw", ""),
        # Balanced after some rounds; what is over stays unused.
        (4, "cccc" "cwcw", "ccww", "cccc"),
        (4, "wwww" "wwww" "wwcc", "ccww", "wwwwwwww"),
        (2, "cc" "cc" "wc", "cw", "cccc"),
        # An odd one goes to the wrong, unless they lack.
        (5, "ccccc" "wwwww", "ccwww", "cccww"),
        (5, "ccccc" "wwccc", "cccww", "ccccc"),
        (3, "www" "cww", "cww", "www"),
        (3, "ccc" "wcc", "ccw", "ccc"),
        # One kind lacks, or is missing.
        (4, "wwww" "wwww" "wwww" "wcww", "cwww", "wwwwwwwwwwww"),
        (4, "cccc" "cccc" "cccc" "cccw", "cccw", "cccccccccccc"),
        (4, "wwww" "wwww" "wwww" "wwww", "wwww", "wwwwwwwwwwww"),
        (3, "ccc" "ccc" "ccc" "ccc", "ccc", "ccccccccc"),
        # Truncated and missing answers are wrong ones.
        (4, "cccc" "tnww", "cctn", "ccww"),
    ],
)  # fmt: skip
def test_an_adaptive_group_is_as_balanced_as_its_samples_allow(n, verdicts, chosen, unused):
    rounds = -(-len(verdicts) // n)
    group = one_group(verdicts.ljust(4 * n, "?"), n)
    assert Counter(letters(group.samples)) == Counter(chosen)
    assert Counter(letters(group.unused)) == Counter(unused)
    assert len(group.samples) == n and len(group.drawn) == rounds * n
    assert sorted(sample.index for sample in group.drawn) == list(range(rounds * n))


def test_verdictless_samples_count_as_neither_right_nor_wrong():
    group = one_group("cooe" "cwww", 4)  # fmt: skip
    assert Counter(letters(group.samples)) == Counter("ccww")
    assert Counter(letters(group.unused)) == Counter("ooew")


def test_verdictless_samples_fill_a_group_that_lacks_others():
    group = one_group("oooo" "coee" "ooow" "eooo", 4)  # fmt: skip
    assert letters(group.samples)[:2] == "cw" and set(letters(group.samples)[2:]) <= {"o", "e"}
    assert len(group.samples) == 4 and len(group.unused) == 12
    assert sorted(sample.index for sample in group.drawn) == list(range(16))
    nothing = one_group("o" * 16, 4)
    assert letters(nothing.samples) == "oooo" and len(nothing.unused) == 12


def test_only_prompts_that_lack_a_kind_are_sampled_on():
    needed = {"0": 1, "1": 2, "2": 3, "3": 9}  # rounds until half of a group is correct

    def verdict(prompt, index):
        return "c" if index >= 4 * (needed[prompt] - 1) and index % 2 else "w"

    steps = Steps(adaptive(), verdict, prompts_per_step=4, prompts=4)
    rollout = steps.sample(0)
    assert [sorted(prompts) for _, prompts, *_ in steps.sampler.draws] == [
        list("0123"),
        list("123"),
        list("23"),
        ["3"],
    ]
    assert [indices for *_, indices, _ in steps.sampler.draws] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    assert number_of_samples_that_repeat(steps.sampler) == 0
    assert {group.prompt.id: letters(sorted_by_verdict(group)) for group in rollout.groups} == {
        "0": "ccww",
        "1": "ccww",
        "2": "ccww",
        "3": "wwww",
    }
    assert {group.prompt.id: len(group.drawn) for group in rollout.groups} == {"0": 4, "1": 8, "2": 12, "3": 16}
    assert ids(rollout.groups) == [p.id for p in steps.prompts.at_step(0, 4, 0)] and rollout.replaced == []


def sorted_by_verdict(group):
    return sorted(group.samples, key=lambda sample: not sample.correct)


def test_reinforce_ada_draws_eight_a_round_and_keeps_four():
    steps = Steps("reinforce_ada", lambda prompt, i: "c" if i >= 8 * (int(prompt) % 3) and i % 2 else "w")
    rollout = steps.sample(0)
    assert [indices for *_, indices, _ in steps.sampler.draws] == [list(range(8 * i, 8 * i + 8)) for i in range(3)]
    assert number_of_samples_that_repeat(steps.sampler) == 0
    for group in rollout.groups:
        assert Counter(letters(group.samples)) == Counter("ccww")
        assert len(group.drawn) == 8 * (1 + int(group.prompt.id) % 3)
    hopeless = Steps("reinforce_ada", lambda prompt, i: "w")
    assert [len(g.drawn) for g in hopeless.sample(0).groups] == [32] * 6
    assert [len(g.samples) for g in hopeless.sample(0).groups] == [4] * 6


@pytest.mark.parametrize(("n", "per_round"), [(4, 1), (4, 3), (5, 4), (5, 9), (3, 2)])
def test_a_group_has_its_size_however_many_samples_a_round_draws(n, per_round):
    rng = np.random.default_rng(n)
    table = rng.choice(list("cwo"), size=(30, 8 * per_round), p=[0.4, 0.5, 0.1])
    recipe = adaptive(samples_per_round=per_round, backfill_rounds=8)
    steps = Steps(recipe, lambda prompt, i: str(table[int(prompt), i]), n=n, prompts_per_step=30)
    groups = steps.sample(0).groups
    assert {len(group.samples) for group in groups} == {n}
    assert all(sorted(s.index for s in group.drawn) == list(range(len(group.drawn))) for group in groups)
    assert all(len(group.drawn) % per_round == 0 for group in groups)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_adaptive_sampling_stops_after_its_rounds(rounds):
    steps = Steps(adaptive(backfill_rounds=rounds), lambda prompt, i: "w")
    rollout = steps.sample(0)
    assert len(steps.sampler.draws) == rounds
    assert all(len(group.samples) == 4 and len(group.drawn) == 4 * rounds for group in rollout.groups)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8])
def test_adaptive_groups_have_their_size_and_lose_no_sample_whatever_the_verdicts(n):
    rng = np.random.default_rng(n)
    table = rng.choice(list("cwnto"), size=(30, 4 * n), p=[0.2, 0.5, 0.1, 0.1, 0.1])
    steps = Steps(adaptive(), lambda prompt, i: str(table[int(prompt), i]), n=n, prompts_per_step=30)
    for group in steps.sample(0).groups:
        drawn = letters(group.drawn)
        assert len(group.samples) == n
        indices = [sample.index for sample in group.drawn]
        assert sorted(indices) == list(range(len(indices)))
        right, wrong = drawn.count("c"), sum(map(drawn.count, "wnt"))
        chosen = letters(group.samples)
        assert chosen.count("o") == max(n - right - wrong, 0)
        expected = min(right, max(n // 2, n - wrong))
        assert chosen.count("c") == expected, (drawn, chosen)
        assert min(right, wrong) >= n // 2 or len(drawn) == 4 * n


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_the_greedy_response_is_sampled_at_temperature_zero_beside_the_group():
    steps = Steps("remax", every_third_is_mixed)
    rollout = steps.sample(3)
    assert [group.greedy.text for group in rollout.groups] == [f"{i}/0 at 0" for i in ids(rollout.groups)]
    assert all(sample.text.endswith(" at 1") for group in rollout.groups for sample in group.drawn)
    assert all(len(group.samples) == 4 and group.unused == [] for group in rollout.groups)
    usual, greedy = steps.sampler.draws
    assert usual[0] != greedy[0] and greedy[2] == [0]
    assert (greedy[3].top_p, greedy[3].top_k, greedy[3].max_tokens) == (1.0, 0, 1024)


def test_groups_that_came_by_backfill_have_a_greedy_response_too():
    steps = Steps(resampling(baseline="greedy"), every_third_is_mixed)
    rollout = steps.sample(0)
    assert rollout.replaced
    assert [group.greedy.text for group in rollout.groups] == [f"{i}/0 at 0" for i in ids(rollout.groups)]
    assert all(group.greedy is None for group in rollout.replaced)


@pytest.mark.parametrize(
    "recipe", ["reinforce", resampling(), adaptive(), "remax", resampling(baseline="greedy")], ids=str
)
def test_a_step_is_a_function_of_its_number(recipe):
    steps = Steps(recipe, every_third_is_mixed)
    forwards = [contents(steps.sample(step)) for step in range(7)]
    assert contents(steps.sample(3)) == forwards[3]
    other = Steps(recipe, every_third_is_mixed)
    backwards = [contents(other.sample(step)) for step in reversed(range(7))]
    assert backwards[::-1] == forwards
    assert len({str(step) for step in forwards}) == 7
