#!/usr/bin/env python
"""Makes tables and plots of several result files of evaluate.py; of a sweep, statistics over the seeds.

python scripts/report.py --results output/*/results.json --output_dir output/report
python scripts/report.py --sweep output/relative --output_dir output/report
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hf_relpos.cli import command, parse_arguments
from hf_relpos.results.report import write_report
from hf_relpos.results.result_file import markdown_table, plot_results, plot_scores, read_result


@dataclass
class ReportArguments:
    """Which results, and where the report goes."""

    output_dir: str = field(metadata={"help": "Folder for the tables and the plots."})
    results: list[str] = field(default_factory=list, metadata={"help": "Result files of evaluate.py: a row for each."})
    sweep: str | None = field(
        default=None,
        metadata={"help": "Output folder of sweep.py: statistics over the seeds, as report.html and report.md."},
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Setting that the others of a sweep are compared to; the first by default."}
    )
    varied: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the recipe that a sweep varies, such as recipe.learning_rate; others must agree."},
    )
    title: str = field(default="Position schemes", metadata={"help": "Heading of the page of a sweep."})


@command
def main() -> None:
    (args,) = parse_arguments((ReportArguments,), __doc__)
    folder = Path(args.output_dir)
    if bool(args.results) == bool(args.sweep):
        raise ValueError("either --results or --sweep is required.")
    results = _read(_listed(Path(args.sweep)) if args.sweep else [Path(path) for path in args.results])
    if args.sweep:
        paths = write_report(results, folder, args.baseline, args.title, args.varied)
    else:
        table = markdown_table(results)
        plots = (plot_scores if "task" in results[0] else plot_results)(results, folder)
        (folder / "table.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        paths = [folder / "table.md", *plots]
    print("\n".join(f"wrote {path}" for path in paths))


def _listed(root: Path) -> list[Path]:
    """The results that sweep.py listed."""
    try:
        listed = (root / "results.txt").read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"`sweep` {str(root)!r} holds no finished sweep: {error}") from error
    return [root / path for path in filter(None, listed)]


def _read(paths: list[Path]) -> list[dict]:
    """Result files; one that cannot be read is named and left out."""
    results, errors = [], []
    for path in paths:
        try:
            results.append(read_result(path))
        except ValueError as error:
            errors.append(str(error))
    if not results:
        raise ValueError("no result can be read: " + "; ".join(errors))
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
