"""What the model at hand can do."""

import importlib.util

import pytest
import torch

from megarl.config import LearnerConfig
from megarl.learner.model import can_share_prompts
from megarl.types import UserError


@pytest.mark.parametrize(("precision", "can"), [("fp32", True), ("bf16", False)])
def test_prompts_are_shared_where_the_attention_at_hand_can(monkeypatch, precision, can):
    """On a pretended GPU with Transformer Engine, which fp32 doesn't use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert can_share_prompts(LearnerConfig(), precision) == can
    if can:
        assert can_share_prompts(LearnerConfig(share_prompts=True), precision)
    else:
        with pytest.raises(UserError, match=r"learner\.share_prompts=true.*use auto"):
            can_share_prompts(LearnerConfig(share_prompts=True), precision)
