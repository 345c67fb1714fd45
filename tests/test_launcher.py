"""How many ranks a machine gets and with what, by functions of plain values."""

import pytest

from megarl.config import LearnerConfig
from megarl.launcher import rank_count, rank_environment
from megarl.types import UserError


@pytest.mark.parametrize(
    ("world_size", "size", "gpus", "ranks"),
    [
        (None, 2, 0, 2),  # no GPU: one model
        (3, 1, 0, 3),
        (None, 1, 8, 8),  # all GPUs
        (None, 2, 8, 8),
        (None, 3, 8, 6),  # as many whole models as fit
        (2, 2, 8, 2),
        (None, 1, 1, 1),
    ],
)
def test_a_machine_gets_the_ranks_asked_for_or_all_that_it_has_gpus_for(world_size, size, gpus, ranks):
    learner = LearnerConfig(world_size=world_size, tensor_model_parallel_size=size)
    assert rank_count(learner, gpus) == ranks


@pytest.mark.parametrize(("world_size", "words"), [(9, "learner.world_size=9"), (None, "parallel_size=3")])
def test_more_ranks_than_gpus_are_refused(world_size, words):
    learner = LearnerConfig(world_size=world_size, pipeline_model_parallel_size=3)
    with pytest.raises(UserError, match=f"{words} is more than this machine's 2 GPUs; use at most 2"):
        rank_count(learner, 2)


def test_ranks_share_the_cores_of_a_gpu_machine_and_take_one_thread_each_on_cpus():
    threads = {gpus: rank_environment(8, gpus, 96)["OMP_NUM_THREADS"] for gpus in (0, 8)}
    assert threads == {0: "1", 8: "12"}
    assert rank_environment(8, 8, 4)["OMP_NUM_THREADS"] == "1"
