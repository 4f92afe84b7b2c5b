"""What the pages in docs/ name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/cases.md").read_text(encoding="utf-8")
CASES = sorted(set(re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", PAGE)))


@pytest.mark.parametrize(("file", "test"), CASES)
def test_a_test_that_the_cases_name_is_there(file, test):
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert not test or f"def {test}(" in text


def test_the_cases_are_read():
    assert len(CASES) > 80
