"""Writes what a study found: results.json, report.md and the plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megarl.algorithms import RECIPES
from megarl.models.family import architecture, read_hf_config
from megarl.models.hugging_face import HuggingFaceFiles
from megarl.study.claims import A_THIRD, CLAIMS, TIE_MARGIN, Claim, Judgement, judge
from megarl.study.config import OF_THE_ROW, Settings, flatten
from megarl.study.plots import write_plots
from megarl.study.results import QUANTITIES, Results
from megarl.study.statistics import Interval, interval
from megarl.types import UserError
from megarl.versions import package_versions

RELATIONS = {"greater": ">", "less": "<", "tie": "=", "no_gain": "≤"}


def write_report(results: Results) -> Path:
    """Into the study folder; returns the report's file."""
    folder = results.study.folder
    found = {recipe: _intervals(results, recipe) for recipe in results.runs}
    judgements = [judge(claim, results) for claim in CLAIMS]
    (folder / "results.json").write_text(json.dumps(_numbers(results, found, judgements), indent=1) + "\n")
    plots = write_plots(results, folder / "plots")
    parts = [_head(results), _table(results, found), _claims(judgements), _pictures(plots, folder), _method(results)]
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _intervals(results: Results, recipe: str) -> dict[str, Interval]:
    scores = {quantity: results.scores(quantity, recipe) for quantity in QUANTITIES}
    return {quantity: interval(matrix) for quantity, matrix in scores.items() if matrix is not None}


def _numbers(results: Results, found: dict[str, dict[str, Interval]], judgements: list[Judgement]) -> dict[str, Any]:
    """Everything the report says, and every evaluation; `total/...` is the sum over the steps so far."""
    return {
        "scale": results.study.scale,
        "steps": results.study.rows[0].config.run.steps,
        "held_out_problems": results.problems,
        "samples_per_problem": results.k,
        "unfinished": [row.name for row in results.unfinished],
        "recipes": {
            recipe: {quantity: asdict(value) for quantity, value in values.items()} for recipe, values in found.items()
        },
        "claims": [asdict(judgement) for judgement in judgements],
        "runs": {recipe: {str(run.row.seed): run.evaluations for run in runs} for recipe, runs in results.runs.items()},
    }


def _head(results: Results) -> str:
    study, config = results.study, results.study.rows[0].config
    seeds = {recipe: len(runs) for recipe, runs in results.runs.items()}
    lines = [
        f"# {len(results.runs)} recipes, {max(seeds.values())} seeds, {config.run.steps} steps",
        f"One small task (`{config.data.train}`) and one model ({_parameters(config.model.path)} parameters). What "
        "holds here need not hold for a large model on real problems, and the other way round.",
    ]
    if results.unfinished:
        names = ", ".join(row.name for row in results.unfinished)
        lines.append(f"**Incomplete:** {len(results.unfinished)} of {len(study.rows)} rows have not finished: {names}.")
    return "\n\n".join(lines)


def _table(results: Results, found: dict[str, dict[str, Interval]]) -> str:
    k = results.k
    start = np.mean([run.evaluations[0][f"eval/avg@{k}"] for runs in results.runs.values() for run in runs])
    start_pass = np.mean([run.evaluations[0][f"eval/pass@{k}"] for runs in results.runs.values() for run in runs])
    columns = {
        f"avg@{k} [95%]": ("avg", _bounds),
        f"pass@{k} [95%]": ("pass", _bounds),
        "KL a token": ("kl", "{:.3f}"),
        "KL a response": ("kl_sequence", "{:.2f}"),
        "entropy": ("entropy", "{:.3f}"),
        "response tokens": ("response_length", "{:.1f}"),
        "samples generated": ("samples_generated", "{:,.0f}"),
        "samples learned from": ("samples_kept", "{:,.0f}"),
        "tokens generated": ("tokens_generated", "{:,.0f}"),
        "tokens learned from": ("tokens_kept", "{:,.0f}"),
        "seconds": ("seconds", "{:,.0f}"),
    }
    lines = ["| recipe | seeds | " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) + 1)]
    lines.append(f"| (start) | | {start:.3f} | {start_pass:.3f} |" + " |" * (len(columns) - 2))
    for recipe in sorted(found, key=lambda name: -found[name]["avg"].mean):
        cells = [_cell(found[recipe].get(quantity), form) for quantity, form in columns.values()]
        lines.append(f"| `{recipe}` | {len(results.runs[recipe])} | " + " | ".join(cells) + " |")
    return "## Results after the last step\n\n" + "\n".join(lines)


def _bounds(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _cell(value: Interval | None, form: Any) -> str:
    if value is None:
        return "–"
    return form(value) if callable(form) else form.format(value.mean)


def _claims(judgements: list[Judgement]) -> str:
    lines = [
        "## The paper's claims",
        "",
        "What the 95% interval of the difference says about each claim of arXiv 2504.11343, in this study. "
        f"`=`: within ±{TIE_MARGIN:g} of avg@k; `≤`: not more than {TIE_MARGIN:g} above; `≈ ⅓`: the ratio, here of the "
        f"geometric means over seeds, lies between {A_THIRD[0]:.2f} and {A_THIRD[1]:.2f}. With few seeds, expect "
        "*can't tell*.",
        "",
        "| claim | difference or ratio | observed [95%] | this study |",
        "|---|---|---:|---|",
    ]
    for judgement in judgements:
        claim, found = judgement.claim, judgement.observed
        form = "{:.2f}" if claim.relation == "a_third" else "{:+.3f}"
        numbers = f"{form} [{form}, {form}]".format(found.mean, found.low, found.high) if found else "–"
        lines.append(f"| {claim.text} ({claim.source}) | {_compared(claim)} | {numbers} | {judgement.verdict} |")
    return "\n".join(lines)


def _compared(claim: Claim) -> str:
    if claim.relation == "a_third":
        return f"{claim.quantity}: `{claim.left}` / `{claim.right}` ≈ ⅓"
    return f"{claim.quantity}: `{claim.left}` {RELATIONS[claim.relation]} `{claim.right}`"


def _pictures(plots: list[Path], folder: Path) -> str:
    return "## Curves\n\n" + "\n\n".join(f"![{plot.stem}]({plot.relative_to(folder)})" for plot in plots)


def _method(results: Results) -> str:
    study, first = results.study, results.study.rows[0].config
    usual = _usual_settings(results)
    early = sorted({run.early_step for runs in results.runs.values() for run in runs})
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    wrong = np.mean([run.steps[0]["groups/all_wrong"] for runs in results.runs.values() for run in runs])
    facts = [
        f"Every run starts from `{first.model.path}` and makes {first.run.steps} steps. Seeds "
        f"{', '.join(map(str, study.seeds))}; a seed orders the prompts and seeds every response. The `config.yaml` of "
        f"each run is complete. In the first step, {wrong:.0%} of the prompts were answered all wrong.",
        f"A step: {usual['schedule.prompts_per_step']} prompts x {usual['schedule.samples_per_prompt']} samples, at "
        f"temperature {usual['rollout.temperature']:g} and of at most {usual['rollout.max_response_tokens']} tokens; "
        f"AdamW, learning rate {usual['optim.lr']:g} ({usual['optim.lr_schedule']}); passes over a step's samples: "
        f"{usual['schedule.epochs']}. " + _exceptions(results, usual),
        f"Held out: {results.problems} problems, {results.k} samples each, at temperature {first.eval.temperature:g}. "
        f"A quarter of the way is step {', '.join(map(str, early))}.",
        *_probe(results),
        "Samples learned from are those that entered the loss. Seconds are those spent in steps, evaluations included, "
        "on a machine that may have had other work.",
        "Intervals: of results on held-out problems, Student's t over runs (Welch's for a difference) and the sampling "
        "of problems together; of entropy, KL and lengths, over runs alone, for these prompts. "
        f"megarl/study/statistics.py has the formula. {len(study.seeds)} seeds say little about the spread between "
        f"seeds, which is why intervals are wide, and they are not corrected for making {len(CLAIMS)} comparisons.",
        f"Versions: {versions}.",
    ]
    return "## How it was measured\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _usual_settings(results: Results) -> Settings:
    """Each setting as most recipes have it; at a tie, as the first."""
    of_recipes = [_settings(results, recipe) for recipe in results.study.recipes]
    usual = {}
    for key in of_recipes[0]:
        values = [settings[key] for settings in of_recipes]
        usual[key] = max(values, key=values.count)
    return usual


def _settings(results: Results, recipe: str) -> Settings:
    """Of the recipe's runs, without what makes each run that run, and without the recipe's own fields."""
    config = next(row.config for row in results.study.rows if row.recipe == recipe)
    return {k: v for k, v in flatten(config.model_dump(exclude={"recipe"})).items() if k not in OF_THE_ROW}


def _exceptions(results: Results, usual: Settings) -> str:
    """What the study sets otherwise for some recipes, the fields of shipped recipes included."""
    exceptions = []
    for recipe in results.runs:
        changed = {key: value for key, value in _settings(results, recipe).items() if value != usual[key]}
        fields, shipped = results.runs[recipe][0].row.config.recipe.model_dump(), RECIPES[recipe].model_dump()
        changed |= {f"recipe.{key}": value for key, value in fields.items() if value != shipped[key]}
        if changed:
            exceptions.append(f"`{recipe}`: " + ", ".join(f"{key}={value}" for key, value in changed.items()))
    return "Other settings of some recipes: " + "; ".join(exceptions) + "." if exceptions else "So for all recipes."


def _probe(results: Results) -> list[str]:
    """What entropy and KL were measured on, where they were."""
    if all(results.scores("entropy", recipe) is None for recipe in results.runs):
        return []
    from megarl.learner.agreement import PROBE_GROUPS  # imports Megatron

    return [
        f"Entropy (of the whole distribution) and KL are measured on the held-out samples of the first "
        f"{min(PROBE_GROUPS, results.problems)} held-out problems alone; KL is the log-probability minus that of the "
        "starting policy, averaged over tokens, or summed over a response."
    ]


def _parameters(path: str) -> str:
    """The size of the model that the runs start from."""
    try:
        files = HuggingFaceFiles(path)
        arch = architecture(read_hf_config(path))
    except UserError:  # the model may be gone by the time the report is written again
        return "an unknown number of"
    count = sum(tensor.numel() for _, tensor in files.tensors(arch))
    return f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.1f}B"
