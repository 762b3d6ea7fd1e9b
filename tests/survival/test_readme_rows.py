"""Every row of the README's "What survives what" names tests, and they are there."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SECTION = re.search(
    r"^## What survives what$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S
)[1]
ROWS = [
    row.strip("|").split(" | ")
    for row in SECTION.splitlines()
    if row.startswith("| ") and not row.startswith("| **") and "| test |" not in row
]


def test_the_section_is_as_long_as_it_should_be():
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip()[:40] for row in ROWS])
def test_each_row_names_tests_that_exist(row):
    happening, answer, tests = row
    assert happening.strip() and answer.strip()
    named = re.findall(r"`(tests/[\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", tests)
    assert named
    for path, names in named:
        body = ast.parse((ROOT / path).read_text()).body
        there = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert not set(re.findall(r"test_\w+", names)) - there
    # Nothing but what was checked.
    assert len(re.findall(r"test_\w+`", tests)) == sum(
        n.count("`test_") for _, n in named
    )
