"""How old the samples of a step may be, and what is said where a node's engines can't be had."""

import socket

import numpy as np
import pytest

from megarl.config import parse_config
from megarl.rollout.connection import Invitation
from megarl.rollout.source import StalenessError, check_staleness, start_host
from megarl.types import Prompt, Rollout, Sample, SampleGroup, UserError


def sample(*versions):
    zeros = np.zeros(len(versions), np.float32)
    return Sample(0, zeros.astype(np.int32), zeros, "", "stop", np.array(versions, np.int32))


def rollout_of(samples, **others):
    prompt = Prompt("p", "?", np.array([1], np.int32), "3", "test")
    replaced = [SampleGroup(prompt, samples=others.pop("replaced", []))]
    return Rollout([SampleGroup(prompt, samples, **others)], replaced=replaced)


@pytest.mark.parametrize("versions", [(5,), (7,), (5, 5, 6, 7), (6, 6)])
def test_weights_up_to_so_many_steps_behind_are_used(versions):
    check_staleness(rollout_of([sample(7), sample(*versions)]), step=7, most=2)


@pytest.mark.parametrize("where", ["samples", "unused", "greedy", "replaced"])
@pytest.mark.parametrize("versions", [(4,), (4, 5), (7, 8), (8,)])
def test_a_single_token_by_older_weights_or_by_later_ones_is_refused(versions, where):
    odd = sample(*versions)
    parts = {"samples": [sample(6)], where: odd if where == "greedy" else [sample(6), odd]}
    with pytest.raises(StalenessError, match=f"step 7 .* versions {versions[0]} to {versions[-1]}; .* 5 to 7"):
        check_staleness(rollout_of(**parts), step=7, most=2)


def test_a_node_that_cannot_reach_rank_0_says_so_in_one_line():
    sections = {"model": {"path": "model"}, "data": {"train": "arithmetic"}, "learner": {}, "rollout": {"engines": 2}}
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        invitation = Invitation(["127.0.0.1", "no.such.host.invalid"], port, bytes(32))
        with pytest.raises(UserError, match=rf"^node 1 of 2: .*127.0.0.1:{port} .*or no.such.host.invalid.*any port"):
            start_host(parse_config(sections), invitation, 1, 2)
