"""What the README tells is true: its tables are generated, its map exists, its examples decode."""

import json
import re
from pathlib import Path

import pytest

from tailrace.errors import TailraceError
from tailrace.events import decode_event
from tailrace.settings import settings_table
from tests.bench.report import load_results, markdown_table, readme_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def section(begin: str) -> str:
    found = re.search(rf"<!-- {begin}: begin -->\n(.*?)<!-- {begin}: end -->", README, re.DOTALL)
    assert found, f"README.md has lost its `{begin}` markers"
    return found[1].strip()


def test_the_configuration_table_is_generated_from_the_settings() -> None:
    assert section("settings") == settings_table()


def test_the_measured_section_shows_the_last_bench() -> None:
    assert readme_table() == markdown_table(load_results())


def test_every_file_of_the_map_exists() -> None:
    paths = re.findall(r"^\s*([\w./-]+/|[\w./-]+\.(?:py|toml|md|jsonl|json))\s{2,}", section("map"), re.MULTILINE)
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_module_is_on_the_map() -> None:
    shown = section("map")
    modules = [
        path.relative_to(ROOT).as_posix()
        for package in ("tailrace", "stream", "services", "training", "deploy")
        for path in sorted((ROOT / package).glob("*.py"))
        if path.name != "__init__.py"
    ]
    missing = [module for module in modules if module not in shown]
    assert not missing


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
            assert re.search(rf"\b{name}\b", drawn), f"{name} is missing from the tree at the head of tailrace/errors.py"


@pytest.mark.parametrize("test_name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_every_test_named_exists(test_name: str) -> None:
    assert any(f"def {test_name}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
