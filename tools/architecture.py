"""Draw the rooms of the product from its imports: docs/images/architecture.svg, and docs/architecture.md around it.

    python tools/architecture.py            write both
    python tools/architecture.py --check    exit 1 where they are not what the imports say now

A room is a folder, or a file directly in trainer_core. A room stands above every room that it imports. An arrow is left
out where a longer way says the same. What a room is for is the docstring of its __init__.py.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SVG, PAGE = ROOT / "docs" / "images" / "architecture.svg", ROOT / "docs" / "architecture.md"
WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, TOP, GAP = 1120, 46, 104, 24, 18
FACES = ("cli.py", "nodes")
Graph = dict[str, set[str]]


def product_files(root: Path = ROOT) -> list[Path]:
    """Every Python file that users run, relative to the root."""
    folders = [path for name in ("trainer_core", "nodes") for path in (root / name).rglob("*.py")]
    return sorted(path.relative_to(root) for path in (*folders, root / "cli.py"))


def imports_of(path: Path, known: set[Path], root: Path = ROOT) -> Iterator[Path]:
    """The product's files that a file imports, wherever the import stands: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse((root / path).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent
            for _ in range(node.level - 1):
                base = base.parent
            base = base.joinpath(*(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                module = next((p for p in (base / f"{alias.name}.py", base.with_suffix(".py")) if p in known), None)
                if module and module != path:
                    yield module


def file_graph(root: Path = ROOT) -> dict[Path, set[Path]]:
    """File -> the files that it imports."""
    files = product_files(root)
    known = set(files)
    return {path: set(imports_of(path, known, root)) for path in files}


def room_of(path: Path) -> str:
    """The room that a file stands in: cli.py, nodes, or a folder or file of trainer_core."""
    return path.parts[1] if path.parts[0] == "trainer_core" else path.parts[0]


def room_graph(files: Mapping[Path, set[Path]]) -> Graph:
    """Room -> the other rooms that its files import."""
    rooms: Graph = defaultdict(set)
    for path, targets in files.items():
        if path.name != "__init__.py":
            rooms[room_of(path)] |= {room_of(target) for target in targets} - {room_of(path)}
    return dict(rooms)


def floors_of(rooms: Graph) -> dict[str, int]:
    """Room -> its floor: 0 where it imports nothing, else one above the highest that it imports."""
    floors: dict[str, int] = {}

    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"a circle of rooms: {' -> '.join((*above, room))}"
        if room not in floors:
            floors[room] = max((floor(other, (*above, room)) + 1 for other in rooms.get(room, ())), default=0)
        return floors[room]

    for room in rooms:
        floor(room)
    return floors


def reduce_arrows(rooms: Graph) -> Graph:
    """Without the arrows that a longer way implies."""

    def reach(room: str) -> set[str]:
        return {far for near in rooms.get(room, ()) for far in ({near} | reach(near))}

    reached = {room: reach(room) for room in rooms}
    return {
        room: {a for a in targets if not any(a in reached.get(b, ()) for b in targets - {a})}
        for room, targets in rooms.items()
    }


def purpose_of(room: str) -> str:
    """The first line of a room's docstring."""
    path = ROOT / room if room in FACES else ROOT / "trainer_core" / room
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path).read_text("utf-8"))
    return (ast.get_docstring(tree) or "").split("\n")[0]


def lay_out(floors: Mapping[str, int]) -> dict[str, tuple[float, float, float]]:
    """Room -> (left, top, width) of its box; the highest floor first."""
    places: dict[str, tuple[float, float, float]] = {}
    for floor in range(max(floors.values()) + 1):
        row = sorted(room for room, own in floors.items() if own == floor)
        width = min(150.0, (WIDTH - GAP) / len(row) - GAP)
        left = (WIDTH - len(row) * (width + GAP) + GAP) / 2
        top = TOP + (max(floors.values()) - floor) * FLOOR_HEIGHT
        for i, room in enumerate(row):
            places[room] = left + i * (width + GAP), top, width
    return places


def draw(rooms: Graph) -> str:
    """The picture, as SVG."""
    floors = floors_of(rooms)
    places = lay_out(floors)
    height = TOP * 2 + max(floors.values()) * FLOOR_HEIGHT + BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="system-ui, sans-serif" '
        'font-size="14">',
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
    ]
    for room, targets in sorted(reduce_arrows(rooms).items()):
        x, y, width = places[room]
        for target in sorted(targets):
            to_x, to_y, to_width = places[target]
            begin, end = x + width / 2, to_x + to_width / 2
            middle = (y + BOX_HEIGHT + to_y) / 2
            parts.append(
                f'<path d="M{begin:.0f} {y + BOX_HEIGHT:.0f} C{begin:.0f} {middle:.0f} {end:.0f} {middle:.0f} {end:.0f} '
                f'{to_y:.0f}" fill="none" stroke="#9aa7b4" stroke-width="1.2"/>'
            )
    for room, (x, y, width) in sorted(places.items()):
        fill = "#fde8d7" if room in FACES else "#e3eefb" if not room.endswith(".py") else "#eef1f4"
        parts.append(
            f"<g><title>{escape(purpose_of(room))}</title>"
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="8" fill="{fill}" stroke="#5b7083"/>'
            f'<text x="{x + width / 2:.0f}" y="{y + BOX_HEIGHT / 2 + 5:.0f}" text-anchor="middle" fill="#1c2833">'
            f"{escape(room)}</text></g>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_page(rooms: Graph) -> str:
    """docs/architecture.md."""
    floors = floors_of(rooms)
    rows = [
        f"| `{room}` | {purpose_of(room)} |"
        for room in sorted(floors, key=lambda room: (-floors[room], room))
        if not room.endswith(".py") or room in FACES
    ]
    return (
        "# Architecture\n\nA workflow is data; nodes turn it into frozen values; one engine turns those values into a LoRA file.\n\n"
        "![Rooms and their imports](images/architecture.svg)\n\n"
        "Each box is a folder of `trainer_core` (blue), a single file in it (grey), or a face of the engine (orange). A box stands above "
        "all that it imports; imports only go down, which import-linter checks. An arrow is left out where a longer way says the same.\n\n"
        "| room | what it is for |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        "This page is written by `tools/architecture.py` from the imports. Why things are as they are: [decisions](decisions/).\n"
    )


def main() -> int:
    rooms = room_graph(file_graph())
    wanted = {SVG: draw(rooms), PAGE: write_page(rooms)}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: is not what the imports say now; run python tools/architecture.py")
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path], "utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
