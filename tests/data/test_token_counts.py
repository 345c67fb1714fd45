"""What is known of a text without tokenising it holds for the tokens that it has."""

import random

import pytest
from odd_tokenizers import SPECIAL, byte_level, word_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl.config.shipped import BUILT_IN_MODEL
from megarl.data.token_counts import FORMS, TokenCounter
from megarl.data.tokenizer import load_tokenizer

LONGER = "\u0390\u0344\u1d160\ufb2c\ufdfa\ufefb½ﬃa\u0301<\u0338ä"  # in some normal form


def merging(pre_tokenizer, normalizer=None, **model):
    """Byte-level, with merges; `model` are arguments of BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "12", "at", "Ġa"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("a", "t"), ("Ġ", "a")], **model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="12")


def bytes_only(**settings):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | settings)


def digits_first(*steps):
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), *steps])


KNOWN = {
    "plain": lambda: merging(bytes_only()),
    "digits": lambda: merging(digits_first(bytes_only())),
    "split": lambda: merging(pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), bytes_only()])),
    "framed": lambda: byte_level(begin=True, end=True),
    "built-in": lambda: load_tokenizer(BUILT_IN_MODEL),
    **{form: lambda form=form: byte_level(normalizer=getattr(normalizers, form)()) for form in FORMS},
}
UNKNOWN = {
    "words": lambda: word_level(["a", "12"]),
    "characters": lambda: merging(pre_tokenizers.Whitespace()),
    "prefix": lambda: merging(bytes_only(add_prefix_space=True)),
    "removing": lambda: merging(pre_tokenizers.Sequence([pre_tokenizers.Split("a", "removed"), bytes_only()])),
    "twice": lambda: merging(pre_tokenizers.Sequence([bytes_only(), bytes_only()])),
    "replacing": lambda: byte_level(normalizer=normalizers.Replace("a", "at last")),
    "several": lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "fallback": lambda: merging(bytes_only(), byte_fallback=True),
}


def texts():
    rng = random.Random(0)
    alphabet = "aaat 1122x\n" + LONGER
    drawn = ["".join(rng.choices(alphabet[: rng.choice((11, 40))], k=rng.randrange(1, 24))) for _ in range(150)]
    return [*drawn, *LONGER, *(text * 3 for text in SPECIAL), " ", "é", "a\u0301"]


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
@pytest.mark.parametrize("special", [True, False])
def test_what_fits_and_what_has_tokens_is_told_as_tokenising_tells_it(name, special):
    tokenizer = (KNOWN | UNKNOWN)[name]()
    count, asked = TokenCounter(tokenizer, special), texts()
    exact = [len(ids) for ids in tokenizer(asked, add_special_tokens=special)["input_ids"]]
    for limit in (0, 1, 2, 5, 12, 100):
        counts = count(asked, limit)
        assert [n > limit for n in counts] == [n > limit for n in exact]
        assert [n == 0 for n in counts] == [n == 0 for n in exact]
        assert all(told == n for told, n in zip(counts, exact, strict=True) if n > limit)
    assert count([], 3) == []


@pytest.mark.parametrize("name", KNOWN)
def test_short_texts_of_byte_level_tokenizers_count_by_their_bytes(name):
    bounds = TokenCounter(KNOWN[name](), False)(["12 12 12", "1 ½"], 400)
    assert bounds == [8, len("1 1⁄2".encode()) if name in ("NFKC", "NFKD") else len("1 ½".encode())]


@pytest.mark.parametrize("name", UNKNOWN)
def test_texts_of_other_tokenizers_are_all_tokenised(name):
    tokenizer = UNKNOWN[name]()
    assert TokenCounter(tokenizer, True)(texts(), 400) == [len(ids) for ids in tokenizer(texts())["input_ids"]]
