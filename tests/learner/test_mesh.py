"""Which GPU a rank takes, by functions of plain values."""

import pytest

from megarl.learner.mesh import check_devices, device_index
from megarl.types import UserError


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 1, 0), (3, 8, 3), (3, 1, 0), (1, 2, 1)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(local_rank, visible, index):
    assert device_index(local_rank, visible) == index


def test_a_rank_without_a_gpu_of_its_own_is_refused():
    with pytest.raises(UserError, match="LOCAL_RANK=2, but only 2 GPUs are visible"):
        device_index(2, 2)
    with pytest.raises(UserError, match="ranks 1 and 2 have the same GPU"):
        check_devices(["a", "b", "b"])
    check_devices(["a", "b"])
