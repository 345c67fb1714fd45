"""Which checkpoint a run folder means: the one that LATEST names, else the newest complete one, never a damaged one."""

import json

import pytest

from megarl.models.find_checkpoint import complete_checkpoints, find_checkpoint, instead_of, latest_checkpoint
from megarl.types import UserError


def checkpoint(folder, step, state=None):
    path = folder / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    (path / "state.json").write_text(json.dumps({"step": step}) if state is None else state)
    return path


DAMAGE = {
    "no state": (lambda path: (path / "state.json").unlink(), "it has no state.json"),
    "a torn state": (lambda path: (path / "state.json").write_text('{"step": 4, "ev'), "its state.json can't be read"),
    "an empty state": (lambda path: (path / "state.json").write_text(""), "its state.json can't be read"),
    "bytes": (lambda path: (path / "state.json").write_bytes(b"\xff\x00"), "its state.json can't be read"),
    "no object": (lambda path: (path / "state.json").write_text("4"), "its state.json is damaged"),
    "another step": (lambda path: (path / "state.json").write_text('{"step": 3}'), "its state.json is damaged"),
    "no metadata": (lambda path: (path / "metadata.json").unlink(), "it has no metadata.json"),
}


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None and latest_checkpoint(tmp_path) is None
    (tmp_path / "step_000004.partial").mkdir()
    (tmp_path / "step_new").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_latest_chooses_and_without_it_the_newest_complete_one_does(tmp_path):
    two, four, million = (checkpoint(tmp_path, step) for step in (2, 4, 1_000_000))
    assert latest_checkpoint(tmp_path) == million
    (tmp_path / "LATEST").write_text("step_000002\n")
    assert latest_checkpoint(tmp_path) == two
    (tmp_path / "LATEST").unlink()
    (million / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == four and complete_checkpoints(tmp_path) == [two, four]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_or_refused_with_what_works(tmp_path, damage):
    spoil, why = DAMAGE[damage]
    two, four = (checkpoint(tmp_path, step) for step in (2, 4))
    spoil(four)
    assert latest_checkpoint(tmp_path) == two
    (tmp_path / "LATEST").write_text("step_000004")
    with pytest.raises(UserError) as refused:
        latest_checkpoint(tmp_path)
    message = str(refused.value)
    assert f"names step_000004, which is not a complete checkpoint ({why}" in message and "\n" not in message
    assert f"write the name of a complete one into {tmp_path / 'LATEST'} (step_000002), or remove LATEST" in message
    (tmp_path / "LATEST").write_text("step_000002")
    assert latest_checkpoint(tmp_path) == two
    spoil(two)
    (tmp_path / "LATEST").unlink()
    with pytest.raises(UserError, match="step_000004 is not a complete checkpoint .*no other is complete: restore"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("named", ["step_000009", "", "../elsewhere", "step_000002/hf", "\udcff"])
def test_a_latest_that_names_no_checkpoint_is_refused_with_the_ones_there_are(tmp_path, named):
    checkpoint(tmp_path, 2)
    (tmp_path / "LATEST").write_text(named, errors="surrogateescape")
    with pytest.raises(UserError, match=r"not a complete checkpoint \(it .*\); write the name .*\(step_000002\)"):
        latest_checkpoint(tmp_path)


def test_what_cannot_be_read_has_the_others_named(tmp_path):
    two, four, six = (checkpoint(tmp_path, step) for step in (2, 4, 6))
    assert "(step_000004, step_000002)" in instead_of(six)
    assert "no other is complete" in instead_of(checkpoint(tmp_path / "alone", 1))


def test_a_run_folder_means_its_newest_checkpoint_without_latest_too(tmp_path):
    path = checkpoint(tmp_path / "checkpoints", 2)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(path) == path
