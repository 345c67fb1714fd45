"""Turns a source of problems into training data, one row at a time, and accounts for every row.

A row goes through, in this order: reading (problem and reference answer), duplicates, contamination, length of the
prompt, split. What falls out is written beside the result with its reason. Memory holds a hash of each distinct problem
and the evaluation problems, never the rows, so the source may be larger than memory.

    FILE.jsonl            id, question, answer: the columns that `data.train` reads without further settings
    FILE.eval.jsonl       the held-out part, with eval_fraction > 0
    FILE.dropped.jsonl    where, reason, detail, question
    FILE.manifest.json    source, settings, counts, hashes, versions; appears last, so it vouches for the others

All are written under other names in their folder and appear together at the end, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarl.config import DataConfig
from megarl.data.benchmarks import ProblemSet, UnusableRow
from megarl.data.columns import value_of
from megarl.data.overlap import NGRAM, EvaluationProblems, canonical, digest
from megarl.data.prompts import encode_prompts, load_problems, stable_hash
from megarl.data.sources import Rows, files_of, is_file_name
from megarl.data.tokenizer import load_tokenizer
from megarl.files import sha256, writing
from megarl.types import UserError
from megarl.versions import package_versions

ELSEWHERE = "or name another --out"
REASONS = ("unusable", "duplicate", "contaminated", "too_long")
Advance = Callable[[int, int, int | None], None]  # rows read; how far the source is: done, of total


@dataclass(frozen=True)
class Preparation:
    """What to make of which source."""

    source: str
    out: Path
    problem_set: ProblemSet  # its layouts; subset and split where the source is on the hub
    limit: int | None = None  # rows to read
    decontaminate: tuple[str, ...] = ()  # as data.eval
    ngram: int = NGRAM
    eval_fraction: float = 0.0
    seed: int = 0
    prompts: DataConfig | None = None  # template and limit of a prompt's length; None: no prompt is too long
    tokenizer: str | None = None

    def beside(self, kind: str) -> Path:
        return self.out.with_suffix(f".{kind}")

    @property
    def files(self) -> dict[str, Path]:
        return {
            "train": self.out,
            "eval": self.beside("eval.jsonl"),
            "dropped": self.beside("dropped.jsonl"),
            "manifest": self.beside("manifest.json"),
        }


def prepare(job: Preparation, advance: Advance | None = None) -> dict[str, Any]:
    """Write the files; the manifest. Raises UserError, leaving nothing behind, where that can't be done."""
    for path in job.files.values():
        if path.exists():
            raise UserError(f"{path} exists; name another --out")
    rows = Rows("SOURCE", job.source, job.problem_set.subset, job.problem_set.split, streaming=True)
    files = files_of("SOURCE", job.source) if is_file_name(job.source) else []
    source_hash = hashlib.sha256()
    checks = _Checks(job)
    counts: Counter[str] = Counter(dict.fromkeys(("read", *REASONS, "train", "eval"), 0))
    with ExitStack() as stack:
        stack.enter_context(_folder(job.out.parent))
        outputs = {name: stack.enter_context(_Output(path)) for name, path in job.files.items()}
        for where, row in islice(rows, job.limit):
            counts["read"] += 1
            if not files:
                source_hash.update(json.dumps(row, sort_keys=True, default=str).encode())
            if advance:
                advance(counts["read"], rows.done, rows.total)
            layout = job.problem_set.layout_of(row)
            try:
                question, answer = layout.read(where, row)
                if len(layout.turns(where, row)) > 1:
                    raise UserError(f"{where}: a conversation of several turns is not kept; train on the source itself")
                reason, detail = checks.reason_to_drop(question, answer)
            except UnusableRow as error:
                reason, detail = "unusable", str(error).removeprefix(f"{where}: ")
                question = " ".join(str(value_of(row, column)) for column in layout.problem)
            if reason:
                counts[reason] += 1
                outputs["dropped"].write({"where": where, "reason": reason, "detail": detail, "question": question})
                continue
            kind = "eval" if _draw(job.seed, question) < job.eval_fraction else "train"
            counts[kind] += 1
            outputs[kind].write({"id": rows.id_of(where), "question": question, "answer": answer})
        if not counts["train"]:
            told = [f"{counts[reason]} {reason}" for reason in REASONS if counts[reason]]
            told += [f"{counts['eval']} held out by --eval-fraction"] * (counts["eval"] > 0)
            raise UserError(
                f"{job.source}: of {counts['read']} rows none is left to train on ({', '.join(told) or 'no rows'})"
            )
        last = outputs.pop("manifest")
        if not job.eval_fraction:
            outputs.pop("eval")
        manifest = {
            "source": {
                "name": job.source,
                **({} if files else {"subset": job.problem_set.subset, "split": job.problem_set.split}),
                "sha256": _sha256(files) if files else source_hash.hexdigest(),
                "hashed": f"{len(files)} files" if len(files) > 1 else "the file" if files else "the rows read",
            },
            "counts": dict(counts),
            "duplicates_with_another_answer": checks.conflicts,
            "decontamination": {"ngram": job.ngram, "sets": checks.sets, "contaminated": dict(checks.contaminated)},
            "prompt": checks.prompt,
            "split": {"eval_fraction": job.eval_fraction, "seed": job.seed},
            "limit": job.limit,
            "layouts": [[" ".join(layout.problem), layout.answer, layout.rule] for layout in job.problem_set.layouts],
            "files": {out.path.name: {"rows": out.rows, "sha256": out.finish()} for out in outputs.values()},
            "versions": {"python": platform.python_version(), **_versions()},
        }
        last.write(manifest, indent=2)
        last.finish()
        for output in (*outputs.values(), last):
            output.commit()
    return manifest


class _Checks:
    """What a problem must pass, beyond being one. `sets` and `prompt` describe the checks for the manifest."""

    def __init__(self, job: Preparation) -> None:
        self._answers: dict[bytes, bytes] = {}  # hash of a problem -> hash of its answer
        self._evaluation = EvaluationProblems(job.ngram)
        self._prompts = job.prompts
        self._tokenizer: Any = None
        self.conflicts = 0
        self.contaminated: Counter[str] = Counter()
        self.sets: dict[str, dict[str, Any]] = {}
        self.prompt: dict[str, Any] | None = None
        self._read_evaluation_sets(job)
        if job.tokenizer:
            self._read_tokenizer(job)

    def reason_to_drop(self, question: str, answer: str) -> tuple[str | None, str]:
        """One of REASONS and what it rests on; None for a problem to keep."""
        key, answer_key = digest(question), digest(answer)[:8]
        if key in self._answers:
            differs = self._answers[key] != answer_key
            self.conflicts += differs
            return "duplicate", "of an earlier row" + (", with another answer" if differs else "")
        self._answers[key] = answer_key
        if match := self._evaluation.find(question):
            self.contaminated[match.problem.partition(":")[0]] += 1
            return "contaminated", f"{match.problem}: {match.how}"
        if self._tokenizer and self._prompts:
            tokens = len(encode_prompts(self._prompts, [question], self._tokenizer)[0])
            if tokens > self._prompts.max_prompt_tokens:
                return "too_long", f"{tokens} tokens"
        return None, ""

    def _read_evaluation_sets(self, job: Preparation) -> None:
        if not job.decontaminate:
            return
        plain = job.prompts or DataConfig(train=job.source)
        changes = {"eval": list(job.decontaminate), "eval_limit": None}
        try:
            data = DataConfig.model_validate(plain.model_dump() | changes)
        except ValidationError as error:
            raise UserError(f"--decontaminate: {error.errors()[0]['ctx']['error']}") from None
        files = {chosen.name: Path(chosen.source) for chosen in data.eval_sets}
        for problem in load_problems(data, "eval"):
            if problem.source not in self.sets:
                path = files[problem.source]
                self.sets[problem.source] = {
                    "source": str(path),
                    "problems": 0,
                    "sha256": sha256(path) if path.is_file() else None,
                }
            self.sets[problem.source]["problems"] += 1
            self._evaluation.add(problem.id, problem.text)

    def _read_tokenizer(self, job: Preparation) -> None:
        assert job.tokenizer and self._prompts
        self._tokenizer = load_tokenizer(job.tokenizer, setting="--tokenizer ")
        encode_prompts(self._prompts, ["1"], self._tokenizer)  # refuses a chat template that isn't there
        keys = ("prompt_template", "system_prompt", "chat_template", "max_prompt_tokens")
        self.prompt = {"tokenizer": job.tokenizer, **{key: getattr(self._prompts, key) for key in keys}}


class _Output:
    """A JSONL file that appears whole, by `commit`, or not at all: an exception takes a committed one back.

    What can't be written is a UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
        self._hash = hashlib.sha256()
        self._committed = False

    def write(self, row: dict[str, Any], indent: int | None = None) -> None:
        line = (json.dumps(row, ensure_ascii=False, indent=indent) + "\n").encode()
        with writing(self.path, ELSEWHERE):
            self._file.write(line)
        self._hash.update(line)
        self.rows += 1

    def finish(self) -> str:
        """No more rows; the hash of them all."""
        with writing(self.path, ELSEWHERE):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def commit(self) -> None:
        if self.path.exists():
            raise UserError(f"{self.path} exists; name another --out")
        with writing(self.path, ELSEWHERE):
            self._partial.replace(self.path)
        self._committed = True

    def __enter__(self) -> _Output:
        with writing(self.path, ELSEWHERE):
            self._file = self._partial.open("wb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(OSError):  # what is still to be written on a full disk
            self._file.close()
        self._partial.unlink(missing_ok=True)
        if kind and self._committed:
            self.path.unlink(missing_ok=True)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder, for good unless an exception comes."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    with writing(path, ELSEWHERE):
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # somebody else uses it
            for folder in made:
                folder.rmdir()
        raise


def _sha256(files: list[Path]) -> str:
    """Of a file, or of the hashes of several, in order."""
    hashes = [sha256(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _draw(seed: int, question: str) -> float:
    """A number in [0, 1) that depends on seed and problem alone: a split survives other rows coming and going."""
    return stable_hash(seed, "split", canonical(question)) / 2**63


def _versions() -> dict[str, str]:
    return {name: version for name, version in package_versions().items() if name in ("megarl", "transformers")}
