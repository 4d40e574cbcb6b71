"""The shape of the code: no circles, small folders, functions that fit on a screen, and state that knows nothing of the loop."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
LARGEST_FOLDER, USUAL_FOLDER = 15, 12
LONGEST_FUNCTION = 64  # lines without the docstring
# The folder says the rest: one for each family or part of a model, settings beside what carries them out, two packages of bitsandbytes.
SHARED_NAMES = {
    "adaptive_guider.py", "bnb.py", "checkpoint_keys.py", "dataset.py", "degradation.py", "family.py", "masks.py", "modules.py",
    "optimizer.py", "text_encoder.py", "transformer.py", "validation.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    return load_script("tools/architecture.py")


@pytest.fixture(scope="module")
def graph(architecture: ModuleType) -> dict[Path, set[Path]]:
    """File -> the files that it imports."""
    return architecture.file_graph()


def find_circles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """Sets of files that import each other in a loop: files that reach themselves, grouped by what they reach."""

    def reach(start: Path) -> set[Path]:
        seen: set[Path] = set()
        waiting = list(graph.get(start, ()))
        while waiting:
            path = waiting.pop()
            if path not in seen:
                seen.add(path)
                waiting += graph.get(path, ())
        return seen

    reached = {path: reach(path) for path in graph}
    looped = {path for path in graph if path in reached[path]}
    return [{other for other in looped if other in reached[path] and path in reached[other]} for path in looped]


def test_the_search_finds_a_circle():
    a, b, c = map(Path, "abc")
    assert find_circles({a: {b}, b: {c}, c: {b}}) == [{b, c}, {b, c}]


def test_no_files_import_each_other_in_a_circle(graph):
    """Imports inside functions and under TYPE_CHECKING are counted."""
    assert len(graph) > 150 and find_circles(graph) == []


def test_a_false_room_is_seen(architecture, tmp_path):
    for name, text in (("one", "from . import two"), ("two", "def late():\n    from .one import x")):
        (tmp_path / "trainer_core").mkdir(exist_ok=True)
        (tmp_path / "trainer_core" / f"{name}.py").write_text(text, "utf-8")
    (tmp_path / "nodes").mkdir()
    (tmp_path / "cli.py").write_text("", "utf-8")
    assert len(find_circles(architecture.file_graph(tmp_path))) == 2


def test_the_state_of_a_step_knows_nothing_of_the_loop_and_the_step_nothing_of_the_planner(graph):
    step = Path("trainer_core/train/step")
    assert {path for path in graph[step / "state.py"] if step in path.parents} <= {
        step / "oom_recovery.py",
        step / "working_copies.py",
    }
    assert {path for path in graph[step / "working_copies.py"] if step in path.parents} == {step / "joined_lora.py"}
    for name in ("oom_recovery.py", "joined_lora.py"):
        assert not {path for path in graph[step / name] if step in path.parents}
    for path in graph:
        if step in path.parents:
            assert not {target for target in graph[path] if "planner" in target.parts or "hooks" in target.parts}, path


def test_folders_are_small_and_names_say_what_is_in_them(architecture):
    files = [path for path in architecture.product_files() if path.name != "__init__.py"]
    sizes = Counter(path.parent for path in files if path.parent != Path("."))
    (largest, count), *others = sizes.most_common()
    assert largest == Path("nodes") and count <= LARGEST_FOLDER  # a list of equals
    assert all(size <= USUAL_FOLDER for _, size in others), others
    places = defaultdict(list)
    for path in files:
        places[path.name].append(path)
    assert {name for name, paths in places.items() if len(paths) > 1} <= SHARED_NAMES


def test_every_room_says_what_it_is_for(architecture):
    for path in (ROOT / "trainer_core").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def functions(architecture: ModuleType) -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in architecture.product_files():
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def num_lines(node: ast.FunctionDef) -> int:
    """Without the docstring, which is as long as its arguments are many."""
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_functions_fit_on_a_screen(architecture):
    sizes = [(num_lines(node), str(path), node.name) for path, node in functions(architecture)]
    lengths = sorted(size for size, *_ in sizes)
    assert lengths[len(lengths) // 2] <= 5 and lengths[int(0.9 * len(lengths))] <= 17
    assert max(sizes)[0] <= LONGEST_FUNCTION, max(sizes)


def test_the_loop_is_a_page():
    assert len((ROOT / "trainer_core" / "train" / "step" / "loop.py").read_text("utf-8").splitlines()) < 150


def test_every_command_is_in_the_table_of_the_command_line(graph):
    """A file *_command.py is imported by cli.py, or by a command that decides between two of them."""
    commands = {path for path in graph if path.stem.endswith(("_command", "_commands"))}
    table = graph[Path("cli.py")]
    used = table | {path for command in commands & table for path in graph[command]}
    assert len(commands) > 12 and commands <= used
