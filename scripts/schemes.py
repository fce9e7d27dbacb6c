#!/usr/bin/env python
"""Writes docs/schemes.md and its pictures from the registered schemes.

python scripts/schemes.py
"""

from pathlib import Path

from hf_relpos.cli import command
from hf_relpos.scheme_docs import write_schemes_page


@command
def main() -> None:
    for path in write_schemes_page(Path(__file__).parent.parent / "docs"):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
