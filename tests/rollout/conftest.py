"""What the engines' tests share."""

from contextlib import contextmanager

import pytest

from megarl.rollout.transfer import Bucket


@pytest.fixture
def a_flipped_byte(monkeypatch):
    """With a_flipped_byte(): buckets of weights are corrupted after their checksum was taken."""
    original = Bucket.message

    def message(bucket, last):
        made = original(bucket, last)
        bucket.content[made["size"] // 2] ^= 1
        return made

    @contextmanager
    def corrupting():
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "message", message)
            yield

    return corrupting
