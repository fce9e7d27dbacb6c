#!/usr/bin/env python
"""Puts each paragraph of hard-wrapped texts, such as those of Project Gutenberg, on one line.

Line breaks of typeset books are 5 % of the tokens, and a model can tell them from the distance to the last one alone:
they would decide what is measured about positions. Verse, tables and what is indented stay as they are.

python scripts/unwrap_lines.py --files books/*.jsonl.xz --output_dir data/books
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from hf_relpos.cli import command, parse_arguments
from hf_relpos.data.documents import Tally, read_documents
from hf_relpos.data.files import list_files


SHORT_LINE = 45  # characters; verse has shorter ones, prose fills its lines


@dataclass
class UnwrapArguments:
    """Which files, and where the new ones go."""

    files: list[str] = field(metadata={"help": "Files of text, as --train_file takes them."})
    output_dir: str = field(metadata={"help": "Folder of the new files, NAME.jsonl each."})


def unwrap(text: str) -> str:
    """→ the text with each paragraph of prose on one line; paragraphs are what empty lines separate."""
    paragraphs = []
    for part in text.split("\n\n"):
        lines = [line.rstrip() for line in part.split("\n") if line.strip()]
        is_short = len(lines) > 1 and statistics.median(map(len, lines[:-1])) < SHORT_LINE
        if lines and (is_short or any(line[0].isspace() for line in lines)):
            paragraphs.append("\n".join(lines))
        elif lines:
            paragraphs.append(" ".join(lines))
    return "\n\n".join(paragraphs)


@command
def main() -> None:
    (args,) = parse_arguments((UnwrapArguments,), __doc__)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        target = folder / f"{Path(path).name.partition('.')[0]}.jsonl"
        if target.exists():
            raise ValueError(f"`output_dir` holds {target.name!r} already: choose another folder.")
        documents = read_documents(list_files("files", path), "text", "", 2**40, Tally())
        with target.open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({"text": unwrap(document)}, ensure_ascii=False) + "\n")
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
