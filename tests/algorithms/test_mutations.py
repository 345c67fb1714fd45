"""The comparison with the definitions notices every mutation of the package, and nothing in an exact copy."""

from dataclasses import replace

import pytest
from mutations import MUTATIONS, mutant
from test_reference import check

pytestmark = pytest.mark.full


def test_an_unmutated_copy_is_the_definitions():
    with mutant(None) as package:
        assert list(check(package)) == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_caught(mutation):
    with mutant(mutation) as package:
        assert next(check(package, mutation.file), None), f"nothing notices {mutation.name!r}"


def test_a_mutation_whose_text_is_gone_says_so():
    gone = replace(MUTATIONS[0], old="no such text")
    with pytest.raises(AssertionError, match="has its text 0 times"), mutant(gone):
        pass
