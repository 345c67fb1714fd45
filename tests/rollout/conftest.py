"""What the engines' tests share."""

from contextlib import contextmanager

import pytest

from megarl.rollout.pool import RolloutPool
from megarl.rollout.transfer import Bucket


@pytest.fixture
def a_flipped_byte(monkeypatch):
    """With a_flipped_byte(): buckets of weights are corrupted after their checksum was taken."""
    original = Bucket.pack

    def pack(bucket, tensors):
        made = original(bucket, tensors)
        bucket.memory.data[made["size"] // 2] ^= 1
        return made

    @contextmanager
    def corrupting():
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "pack", pack)
            yield

    return corrupting


@pytest.fixture
def in_transit(monkeypatch):
    """With in_transit(change): of each bucket, the buckets that change(bucket) gives arrive in its place."""
    original = RolloutPool._load_all

    @contextmanager
    def changing(change):
        async def load_all(pool, receivers, loads):
            await original(pool, receivers, [arriving for load in loads for arriving in change(load)])

        with monkeypatch.context() as patch:
            patch.setattr(RolloutPool, "_load_all", load_all)
            yield

    return changing
