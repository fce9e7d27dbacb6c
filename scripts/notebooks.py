#!/usr/bin/env python
"""Makes the notebooks of docs/notebooks from the Python files beside them, with a badge that opens them in Colab.

pip install jupytext
python scripts/notebooks.py

The badge needs the repository's address, that of the remote `origin`, if it lies on GitHub; without one there is none.
"""

import re
import subprocess
from pathlib import Path

from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import write_text


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})\n#\n"
COLAB = "https://colab.research.google.com/github/{}/blob/main/docs/notebooks/{}.ipynb"


def notebook(source: Path, repository: str | None) -> str:
    """→ the text of a notebook, without outputs.

    Args:
        source: a Python file with cells marked by `# %%`.
        repository: owner/name on GitHub, for the badge.
    """
    import jupytext

    text = source.read_text(encoding="utf-8")
    if repository:
        badge = BADGE.format(COLAB.format(repository, source.stem))
        text = text.replace("# %% [markdown]\n# ", f"# %% [markdown]\n# {badge}# ", 1)
    made = jupytext.reads(text, fmt="py:percent")
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for index, cell in enumerate(made.cells):
        cell["id"] = f"cell-{index}"
    return jupytext.writes(made, fmt="ipynb").rstrip() + "\n"


def github_repository() -> str | None:
    """owner/name of the remote `origin`, if it lies on GitHub."""
    words = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    address = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?$", address)
    return found[1] if found else None


@command
def main() -> None:
    parse_arguments((), "Makes the notebooks of docs/notebooks from the Python files beside them.")
    for source in sorted(FOLDER.glob("*.py")):
        write_text(source.with_suffix(".ipynb"), notebook(source, github_repository()))
        print(f"wrote {source.with_suffix('.ipynb')}")


if __name__ == "__main__":
    main()
