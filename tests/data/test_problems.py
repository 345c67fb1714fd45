import hashlib
import json
import pickle
import subprocess
import sys
from datetime import date
from functools import partial

import pytest

from megarl.data.problems import BLOCK, Digest, Problem, Problems, digests
from megarl.types import UserError


def rows(count):
    turns = ({"role": "user", "content": "½?", "asked": date(2024, 7, 26)},)
    return [
        Problem(f"rows.jsonl:{i}", f"{i} × 1 = ?" * (i % 7), "\\frac{1}{2}", "ab"[i % 2], turns if i % 3 else ())
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_problems_are_a_sequence_of_what_was_put_in(count):
    expected = rows(count)
    problems = Problems(iter(expected))
    assert len(problems) == count and list(problems) == expected
    for part in (slice(None), slice(1, 3), slice(-2, None), slice(5, 2), slice(0, count, 400), slice(None, None, -1)):
        assert problems[part] == expected[part]
    assert all(problems[i] == expected[i] for i in range(-count, count, 97))
    for outside in (count, -count - 1):
        with pytest.raises(IndexError):
            problems[outside]


def test_a_digest_is_that_of_the_whole_list_of_a_sources_rows():
    """As records of earlier runs have it."""
    members, expected = rows(9), {}
    for source in "ab":
        told = [[row.source, row.id, row.text, row.answer] for row in members if row.source == source]
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        expected[source] = f"{len(told)} problems, sha256 {digest}"
    assert digests(members) == digests(Problems(members)) == expected
    assert str(Digest()) == f"0 problems, sha256 {hashlib.sha256(b'[]').hexdigest()}"


@pytest.mark.processes
def test_another_process_reads_what_this_one_holds_and_nothing_is_left_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    problems = Problems(rows(5))
    program = "import pickle, sys; problems = pickle.load(sys.stdin.buffer); print(problems[3].text, problems.digests)"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(problems), capture_output=True)
    assert done.stdout.decode().strip() == f"{problems[3].text} {problems.digests}", done.stderr
    assert not list(tmp_path.iterdir())
    other = pickle.loads(pickle.dumps(problems))
    del problems
    assert list(other) == rows(5)


def test_an_error_of_the_source_is_its_own_and_a_full_disk_is_named(monkeypatch):
    def torn():
        yield from rows(2)
        raise UserError("rows.jsonl:3 is not JSON")

    with pytest.raises(UserError, match="^rows.jsonl:3 is not JSON$"):
        Problems(torn())
    monkeypatch.setattr("tempfile.TemporaryFile", partial(open, "/dev/full", "wb"))
    with pytest.raises(UserError, match="can't be written: No space left on device; see to it, or set TMPDIR"):
        Problems(rows(3))
