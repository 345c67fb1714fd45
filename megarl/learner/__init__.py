"""The learner on Megatron-Core. Importing this package prepares torch for machines without a GPU."""

from megarl.learner.cpu import device

device.install()
