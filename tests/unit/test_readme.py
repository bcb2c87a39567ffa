"""What the README tells is true: its tables are generated, its map exists, its examples decode."""

import json
import re
from pathlib import Path

import pytest

from tailrace.errors import TailraceError
from tailrace.events import decode_event
from tests.readme import section, sections

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sections())
def test_a_generated_section_is_as_it_would_be_generated_now(name: str) -> None:
    assert section(name) == sections()[name], "run `python -m tests.readme`"


def test_every_event_example_decodes() -> None:
    examples = re.findall(r"^(clicks|ratings|contexts) +(\{.*\})$", README, re.MULTILINE)
    assert {stream for stream, _ in examples} == {"clicks", "ratings", "contexts"}
    for stream, example in examples:
        event = decode_event(stream, example.encode())
        assert event.user_id == json.loads(example)["user_id"]


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z]+)", README))
    assert named >= {"demo", "test", "bench"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_error_of_the_tree_is_drawn() -> None:
    import tailrace.errors

    drawn = tailrace.errors.__doc__ or ""
    for name, found in vars(tailrace.errors).items():
        if isinstance(found, type) and issubclass(found, TailraceError):
            assert re.search(rf"\b{name}\b", drawn), f"{name} is missing from the tree in tailrace/errors.py"


def test_every_row_of_the_failure_table_has_all_its_cells_and_names_its_test() -> None:
    table = README.partition("### When something dies")[2].partition("## Measured")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 15
    for row in rows:
        assert row.count("|") == 5, row
    for row in rows[2:]:
        assert re.search(r"\| `test_\w+` \|$", row), row


@pytest.mark.parametrize("test_name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_every_test_named_exists(test_name: str) -> None:
    assert any(f"def {test_name}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
