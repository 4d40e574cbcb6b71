"""`python -m chroma_trainer`: the same as the command `chroma-trainer`, where scripts are not on the PATH."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
