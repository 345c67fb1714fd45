"""Responses are read and graded while others are still generated."""

import asyncio
import time

import numpy as np
import pytest

from megarl.config import parse_config
from megarl.data import arithmetic
from megarl.rewards.pool import RewardPool
from megarl.rollout.grading import Grader
from megarl.rollout.messages import Response
from megarl.rollout.reading import Reader
from megarl.types import RewardStatus


@pytest.fixture
def grader(tmp_path):
    config = parse_config(
        {"model": {"path": str(tmp_path)}, "data": {"train": "arithmetic"}, "reward": {"name": "math"}}
    )
    with RewardPool() as rewards:
        grader = Grader(Reader(config, arithmetic.tokenizer()), rewards)
        yield grader
        grader.close()


def response(text, finish_reason="stop"):
    ids = arithmetic.tokenizer()(text, add_special_tokens=False)["input_ids"]
    return Response(
        np.array(ids, np.int32), np.zeros(len(ids), np.float32), finish_reason, np.zeros(len(ids), np.int32)
    )


def test_verdicts_are_in_the_order_of_the_requests_whatever_arrived_first(grader):
    grading = grader.begin(["4", "5", "6", "7"])
    texts = ["\\boxed{4}", "\\boxed{4}", "6", "\\boxed{7}"]
    for place in (2, 0, 3, 1):
        grading.put(place, response(texts[place], "length" if place == 3 else "stop"))
    graded = asyncio.run(grading.results())
    assert [text for text, _ in graded] == texts
    assert [verdict.status.value for _, verdict in graded] == ["correct", "wrong", "no_answer", "truncated"]


def test_a_response_is_graded_before_the_others_have_arrived(grader):
    grading = grader.begin(["4", "5"])
    grading.put(1, response("\\boxed{5}"))
    deadline = time.monotonic() + 60
    while not grading.graded:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    grading.put(0, response("\\boxed{5}"))
    assert [verdict.status for _, verdict in asyncio.run(grading.results())] == [
        RewardStatus.WRONG,
        RewardStatus.CORRECT,
    ]


def test_an_error_while_grading_is_raised_where_the_results_are_wanted(grader):
    grading = grader.begin(["4"])
    grading.put(1, response("\\boxed{5}"))  # there is no such answer
    with pytest.raises(IndexError):
        asyncio.run(grading.results())
