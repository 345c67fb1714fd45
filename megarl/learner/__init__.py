"""The learner on Megatron-Core.

Every module that imports megatron is in this package: importing it prepares torch for machines without a GPU first.
"""

import logging
import warnings

from megarl.learner.cpu import device

device.install()
logging.getLogger("megatron").setLevel(logging.ERROR)
for message in (
    ".*Transformer Engine and Apex are not installed",  # said once, by the layout line of a run
    ".*full scope is deprecated",
    r".*The \.grad attribute of a Tensor that is not a leaf",
    ".*`torch.distributed.*` is deprecated",
):
    warnings.filterwarnings("ignore", message=message)
