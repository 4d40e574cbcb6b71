"""Writes constraints-lowest.txt: every dependency at its lower bound in pyproject.toml. A job of CI tests with these versions.

python tools/lowest_constraints.py            writes the file
python tools/lowest_constraints.py --check    exits with 1 if the file is not up to date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = "constraints-lowest.txt"
NOT_OF_THE_PRODUCT = ("dev", "docs")  # extras
HEAD = "# The lower bounds of pyproject.toml, written by tools/lowest_constraints.py. They need Python 3.10.\n"


def dependencies(extras: bool = False) -> list[str]:
    """Return the requirements in pyproject.toml, or those of its extras that the product uses.

    Python 3.10 has no tomllib, so they are read line by line.
    """
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    if not extras:
        return re.findall(r'"([^"]+)"', re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL)[1])  # type: ignore[index]
    section = re.search(r"\n\[project.optional-dependencies\]\n((?:.+\n)+)", text)[1]  # type: ignore[index]
    lines = [line for line in section.splitlines() if line.partition(" ")[0] not in NOT_OF_THE_PRODUCT]
    return [requirement for line in lines for requirement in re.findall(r'"([^"]+)"', line)]


def lowest() -> str:
    """Return the content of the file."""
    return HEAD + "".join(f"{requirement.replace('>=', '==')}\n" for requirement in dependencies())


def main() -> int:
    path = ROOT / FILE
    if "--check" in sys.argv[1:]:
        return int(path.read_text("utf-8") != lowest())
    path.write_text(lowest(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
