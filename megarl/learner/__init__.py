"""The learner on Megatron-Core.

Every module that imports megatron is in this package: importing it prepares torch for machines without a GPU first.
"""

import logging
import warnings

from megarl.learner.cpu import device

for logger in ("megatron", "torch.utils.cpp_extension"):  # the latter looks for a GPU when Megatron is imported
    logging.getLogger(logger).setLevel(logging.ERROR)
for message in (
    ".*Apex.*not installed",  # optional; torch supplies what they would
    ".*CUDA_DEVICE_MAX_CONNECTIONS",  # of no use without a GPU; the launcher sets it
    ".*full scope is deprecated",
    ".*is experimental and still under active development",
    r".*The \.grad attribute of a Tensor that is not a leaf",
    ".*`torch.distributed.*` is deprecated",
):
    warnings.filterwarnings("ignore", message=message)
device.install()
