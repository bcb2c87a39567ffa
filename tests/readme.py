"""The generated parts of the README. `python -m tests.readme` writes them anew; a test fails while they differ."""

import ast
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from tailrace.settings import settings_table
from tests.bench.report import GPU_RESULTS, load_results, markdown_tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGES = ("tailrace", "tailrace/stores", "tailrace/importers", "stream", "services", "training", "deploy")
_WIDTH = 118
_FILE = 22


def tree_map() -> str:
    """Returns every module with the first sentence of its docstring."""
    lines = ["```text"]
    for package in PACKAGES:
        lines.append(f"{package}/")
        for path in sorted((ROOT / package).glob("*.py")):
            told = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            if told and path.name != "__init__.py":
                about = textwrap.wrap(told, _WIDTH - _FILE - 2)
                lines.append(f"  {path.name:<{_FILE}}{about[0]}")
                lines += [" " * (_FILE + 2) + rest for rest in about[1:]]
    return "\n".join([*lines, "```"])


def sections() -> Mapping[str, str]:
    """Returns what stands between the markers of each generated section."""
    return {
        "map": tree_map(),
        "settings": settings_table(),
        "measured": markdown_tables(load_results()),
        "measured on a gpu": markdown_tables(load_results(GPU_RESULTS)),
    }


def section(name: str) -> str:
    """Returns what the README has between the markers of a section. Raises ValueError when they are gone."""
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)\n<!-- {name}: end -->", README.read_text(), re.DOTALL)
    if not found:
        raise ValueError(f"README.md has lost its `{name}` markers")
    return found[1]


def main() -> None:
    """Writes every generated section into the README."""
    text = README.read_text()
    for name, made in sections().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{made}\n{end}{after}"
    README.write_text(text)


if __name__ == "__main__":
    main()
