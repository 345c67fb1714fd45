"""Without a GPU, what needs one is out of Megatron's reach even where it is installed."""

import importlib
import importlib.util

import pytest
import torch

import megarl.learner  # noqa: F401  installs the device layer
from megarl.learner.cpu.device import GPU_PACKAGES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("package", GPU_PACKAGES)
def test_an_installed_package_that_needs_a_gpu_is_not_imported(package, tmp_path, monkeypatch):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError):
        importlib.import_module(package)
    assert importlib.util.find_spec(package) is None


def test_megatrons_optimizer_is_torchs():
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.utils import local_multi_tensor_l2_norm

    assert optimizer.Adam is torch.optim.AdamW and not distrib_optimizer.HAVE_APEX_OR_TE
    assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
