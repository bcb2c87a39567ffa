"""Who may import whom, and what an import may not do."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "torch", "transformers", "onnxruntime"}
LAYERS = ("tailrace", "services", "stream", "training")  # the last three import the first, and never each other
PACKAGES = {*LAYERS, "deploy", "tests"}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def module_name(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, *, at_import_only: bool) -> Iterator[str]:
    """Gives the top-level packages a tree imports; `at_import_only`: those that importing the module imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield (node.module or "").split(".")[0]
        elif not (at_import_only and _runs_later(node)):
            yield from imported(node, at_import_only=at_import_only)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imports_of(source: Path, *, at_import_only: bool = False) -> set[str]:
    return set(imported(ast.parse(source.read_text(encoding="utf-8")), at_import_only=at_import_only))


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    for source in sources(package):
        # The command line starts everything, and imports what a command needs when the command is given.
        is_command = module_name(source).startswith("tailrace.cli")
        others = (imports_of(source, at_import_only=is_command) & PACKAGES) - {package}
        assert others <= {"tailrace"}, f"{source.relative_to(ROOT)} imports {others}"


def test_tailrace_imports_no_heavy_package_at_module_level() -> None:
    for source in sources("tailrace"):
        assert not imports_of(source, at_import_only=True) & HEAVY, source.relative_to(ROOT)


def test_serving_never_imports_torch_or_transformers() -> None:
    for source in sources("services"):
        assert not imports_of(source) & {"torch", "transformers"}, source.relative_to(ROOT)


def test_only_the_valkey_store_imports_redis() -> None:
    every = [source for package in LAYERS for source in sources(package)]
    users = {module_name(source) for source in every if "redis" in imports_of(source)}
    assert users == {"tailrace.stores.valkey_store"}


def test_importing_all_of_tailrace_connects_nowhere_and_loads_nothing_heavy() -> None:
    script = """
import importlib, json, socket, sys

def refused(*arguments, **options):
    raise AssertionError(f"an import opened a connection: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = socket.getaddrinfo = refused
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    modules = [module_name(source) for source in sources("tailrace") if source.name != "__main__.py"]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(modules)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"tailrace", "kafka"} <= loaded
    assert not loaded & (HEAVY | {"services", "stream", "training", "deploy"})


def test_the_heavy_packages_are_installed_so_that_the_rules_mean_something() -> None:
    assert packages_distributions().keys() >= HEAVY
