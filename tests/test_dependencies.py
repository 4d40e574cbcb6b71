"""What the product imports is declared in pyproject.toml, with lower bounds that a job of CI installs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.narrowing import present
from tools.lowest_constraints import FILE, dependencies, lowest

ROOT = Path(__file__).resolve().parents[1]
# Name of the module -> name of the package, where they differ.
PACKAGES = {
    "PIL": "pillow", "charset_normalizer": "charset-normalizer", "google": "protobuf", "optimum": "optimum-quanto",
    "yaml": "pyyaml",
}  # fmt: skip
OURS = {"chroma_trainer"}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths"}
WITH_TORCH = {"triton"}  # installed with torch where there is one
# tensorboard reads the files that we write; the others are imported by the names in data/source/formats.py.
NOT_IMPORTED = {"tensorboard", "pillow-heif", "pillow-jxl-plugin"}


def product() -> list[Path]:
    return [
        ROOT / "cli.py",
        ROOT / "__init__.py",
        *(ROOT / "nodes").rglob("*.py"),
        *(ROOT / "trainer_core").rglob("*.py"),
    ]


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the top modules of absolute imports, lazy ones and those by name included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "find_spec", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value.partition(".")[0]


@pytest.fixture(scope="module")
def modules() -> dict[str, list[str]]:
    """The modules of other packages, and the files that import them."""
    users: dict[str, list[str]] = {}
    for file in product():
        for name in set(imported(ast.parse(file.read_text("utf-8")))) - set(sys.stdlib_module_names):
            if name:
                users.setdefault(name, []).append(file.relative_to(ROOT).as_posix())
    return users


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in requirements}


def test_what_is_imported_is_declared(modules: dict[str, list[str]]):
    declared = names(dependencies()) | names(dependencies(extras=True))
    undeclared = {
        module: files
        for module, files in modules.items()
        if module not in COMFYUI | WITH_TORCH | OURS and PACKAGES.get(module, module).lower() not in declared
    }
    assert not undeclared


def test_what_is_declared_is_imported(modules: dict[str, list[str]]):
    packages = {PACKAGES.get(module, module).lower() for module in modules}
    declared = names(dependencies()) | names(dependencies(extras=True))
    assert declared - packages == NOT_IMPORTED


def test_only_nodes_for_comfyui_import_it(modules):
    files = [file for module in COMFYUI & modules.keys() for file in modules[module]]
    assert files and all(file.startswith("nodes/comfyui/") for file in files)


def test_lazy_imports_and_imports_by_name_are_seen():
    text = """
def f():
    import a.b
    from c.d import e
    importlib.import_module("g.h")
    find_spec("i")
    from .j import k
"""
    assert set(imported(ast.parse(text))) == {"a", "c", "g", "i"}


def test_every_dependency_has_a_lower_bound():
    for requirement in dependencies() + dependencies(extras=True):
        assert re.fullmatch(r"[\w.-]+>=[\d.]+", requirement), requirement


def test_the_lowest_versions_are_the_bounds():
    assert (ROOT / FILE).read_text("utf-8") == lowest()
    bound = present(re.search(r"torch>=([0-9.]+)", " ".join(dependencies())))[1]
    assert f"torch=={bound}\n" in lowest()


def test_the_readme_says_what_each_is_for():
    text = (ROOT / "README.md").read_text("utf-8")
    table = present(re.search(r"\| Package \| What it is for \|\n\|[-|]+\|\n((?:\|.*\n)+)", text))[1]
    listed = {name for row in table.splitlines() for name in row.split("|")[1].strip().split(", ")}
    assert listed == names(dependencies())


def test_every_folder_of_the_product_is_installed():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = set(
        re.findall(
            r'"(chroma_trainer[\w.]*)",', text[text.index("packages = [") : text.index("[tool.setuptools.package-dir]")]
        )
    )
    folders = {file.parent for top in ("nodes", "trainer_core") for file in (ROOT / top).rglob("__init__.py")}
    assert listed == {
        "chroma_trainer",
        *(f"chroma_trainer.{'.'.join(path.relative_to(ROOT).parts)}" for path in folders),
    }
