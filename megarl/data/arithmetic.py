r"""The built-in verifiable task: additions and linear equations in four graded levels, with exact rational answers.

A demonstration answers in one of three styles: directly, after a scratchpad, or sloppily (marked `~`, mostly wrong).
A model fine-tuned on the mixture draws its style by chance, so the samples of one prompt differ in correctness: there
is something for a policy gradient to prefer, in a model small enough to train in minutes on one core.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEVELS = (1, 2, 3, 4)
SPLITS = ("train", "test")
MAX_PROMPT_TOKENS = 12
MAX_RESPONSE_TOKENS = 24  # with the end-of-sequence token

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_LATEX = ["\\boxed{", "\\frac{", "}{", "}"]
_TOKENS = [PAD, EOS, UNKNOWN, *"0123456789", *"+=x;~", *_LATEX]
VOCABULARY = _TOKENS + [f"<unused_{i}>" for i in range(32 - len(_TOKENS))]  # 32 splits over ranks

STYLE_WEIGHTS = {"direct": 0.20, "scratchpad": 0.30, "sloppy": 0.50}
_SUMMANDS = {
    1: (range(10), range(10)),
    2: (range(10), range(10, 100)),
    3: (range(10, 100),) * 2,
    4: (range(100, 1000),) * 2,
}


@dataclass(frozen=True)
class Problem:
    """A question with its answer in LaTeX, and what the scratchpad and the sloppy demonstrations of it write."""

    question: str
    answer: str
    level: int
    kind: str  # "addition" | "equation"
    scratchpad: str
    sloppy_answer: str  # right only by luck


def problems(seed: int, count: int, split: str, levels: Sequence[int] = LEVELS) -> list[Problem]:
    """`count` problems of a split, a function of the arguments alone; the levels take turns, and may be repeated.

    A question belongs to one split whatever the seed, so no training set meets any test set. Problems are drawn
    independently: a long list of a low level repeats some.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(f"levels: {list(levels)} is not a non-empty selection of {list(LEVELS)}")
    rng = random.Random(f"{split} {seed}")
    drawn: list[Problem] = []
    while len(drawn) < count:
        problem = rng.choice((_addition, _equation))(rng, levels[len(drawn) % len(levels)])
        if split_of(problem.question) == split:
            drawn.append(problem)
    return drawn


def split_of(question: str) -> str:
    """The split a question belongs to: a fifth are "test". `12+7=` and `7+12=` are the same problem."""
    terms = "+".join(sorted(question.rstrip("=").split("+")))
    return "test" if hashlib.sha256(terms.encode()).digest()[0] % 5 == 0 else "train"


def demonstration(problem: Problem, rng: random.Random) -> str:
    """One answer to imitate, in a style drawn by STYLE_WEIGHTS."""
    (style,) = rng.choices(list(STYLE_WEIGHTS), list(STYLE_WEIGHTS.values()))
    if style == "sloppy":
        return f"~\\boxed{{{problem.sloppy_answer}}}"
    scratchpad = f"{problem.scratchpad};" if style == "scratchpad" else ""
    return f"{scratchpad}\\boxed{{{problem.answer}}}"


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer over VOCABULARY; save_pretrained makes it part of a Hugging Face folder.

    AutoTokenizer rebuilds the tokenizer of a Qwen2 model from its vocabulary, merges and added tokens and ignores the
    rest, so this is byte-pair encoding without merges, and the tokens of several characters are added tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(token, normalized=False) for token in _LATEX if len(token) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _addition(rng: random.Random, level: int) -> Problem:
    """Two summands; the scratchpad writes the sum from its last digit, so that a carry is known when it is needed."""
    a, b = (rng.choice(summands) for summands in rng.sample(_SUMMANDS[level], 2))
    total = str(a + b)
    return Problem(f"{a}+{b}=", total, level, "addition", total[::-1], str(_add_without_carry(a, b)))


def _equation(rng: random.Random, level: int) -> Problem:
    """ax+b=c, with integer solutions up to level 2, mostly fractions above; the sloppy answer forgets to subtract b."""
    a, b = rng.randint(2, 2 + level), rng.randint(1, 9)
    product = rng.randint(0, a * (5 + level))
    if level <= 2:
        product -= product % a
    c = product + b
    return Problem(
        question=f"{a}x+{b}={c}",
        answer=_latex(Fraction(product, a)),
        level=level,
        kind="equation",
        scratchpad=f"{a}x={product}",
        sloppy_answer=_latex(Fraction(c, a)),
    )


def _add_without_carry(a: int, b: int) -> int:
    width = max(len(str(a)), len(str(b)))
    columns = zip(str(a).zfill(width), str(b).zfill(width), strict=True)
    return int("".join(str((int(x) + int(y)) % 10) for x, y in columns))


def _latex(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
