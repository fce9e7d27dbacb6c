#!/usr/bin/env python
"""Runs every command and every example of README.md and the guides in docs/, one after the other, in a new folder.

python scripts/run_guides.py
python scripts/run_guides.py --only quickstart train

A block under the comment "<!-- not run: why -->" is left out; one under "<!-- file: NAME -->" is written there first.
What a guide needs of an earlier one, it finds in the same folder. The Python of a page goes on from what stands above.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from hf_relpos.cli import command, parse_arguments


ROOT = Path(__file__).parent.parent
GUIDES = (
    "quickstart",
    "choosing",
    "train",
    "models",
    "evaluate",
    "extend",
    "pretrained",
    "experiments",
    "own_scheme",
    "publish",
    "scale",
    "speed",
)
BLOCK = re.compile(r"^(?:<!-- (not run|file): ([^\n]*) -->\n)?```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FUNCTION = f'hf-relpos() {{ "{sys.executable}" -m hf_relpos "$@"; }}; python() {{ "{sys.executable}" "$@"; }}; set -e\n'


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        page: "README", or the name of a guide.
        language: "bash" or "python".
        code: its text.
        file: where it is written before it is run, or `None`.
        reason: why it is not run, or `None`.
    """

    page: str
    language: str
    code: str
    file: str | None = None
    reason: str | None = None

    def commands(self) -> list[str]:
        """The commands of a bash block, a line each."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def read_blocks(page: str) -> list[Block]:
    """The blocks of bash and Python of a page."""
    path = ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md"
    blocks = []
    for mark, said, language, code in BLOCK.findall(path.read_text(encoding="utf-8")):
        blocks.append(
            Block(page, language, code, said if mark == "file" else None, said if mark == "not run" else None)
        )
    return blocks


def run_block(block: Block, folder: Path, above: str = "") -> subprocess.CompletedProcess:
    """Runs a block in a folder, one of Python after what stands `above` it on its page."""
    if block.file:
        (folder / block.file).write_text(block.code, encoding="utf-8")
    words = (
        ["bash", "-c", FUNCTION + block.code]
        if block.language == "bash"
        else [sys.executable, "-c", above + block.code]
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


def above(block: Block, blocks: list[Block]) -> str:
    """The Python before a block on its page that is run and needs no file."""
    before = blocks[: blocks.index(block)]
    return "".join(
        each.code
        for each in before
        if (each.page, each.language, each.file, each.reason) == (block.page, "python", None, None)
    )


@dataclass
class GuideArguments:
    """Which pages, and where."""

    only: list[str] = field(default_factory=list, metadata={"help": "These pages only: README, quickstart, .."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to run them; a temporary folder by default."})


@command
def main() -> None:
    (args,) = parse_arguments((GuideArguments,), "Runs the commands of README.md and of the guides in docs/.")
    blocks = [block for page in args.only or ("README", *GUIDES) for block in read_blocks(page)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("experiments", "scripts"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        failed = 0
        for block in tqdm(blocks, unit="block", disable=None):
            head = f"{block.page}: {block.code.strip().splitlines()[0][:90]}"
            if block.reason:
                print(f"left out, {block.reason}: {head}")
                continue
            begun = time.monotonic()
            done = run_block(block, folder, above(block, blocks))
            print(f"{'FAILED' if done.returncode else 'done'} in {time.monotonic() - begun:.0f} s: {head}", flush=True)
            if done.returncode:
                failed += 1
                print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
    if failed:
        raise ValueError(f"{failed} of {len(blocks)} blocks failed.")


if __name__ == "__main__":
    main()
