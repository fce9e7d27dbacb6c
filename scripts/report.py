#!/usr/bin/env python
"""Makes one table and plots of several result files of evaluate.py.

python scripts/report.py --results output/*/results.json --output_dir output/report
"""

from dataclasses import dataclass, field
from pathlib import Path

from hf_relpos.cli import command, parse_arguments
from hf_relpos.results import markdown_table, plot_results, read_result


@dataclass
class ReportArguments:
    """Which results, and where the report goes."""

    results: list[str] = field(metadata={"help": "Result files of evaluate.py."})
    output_dir: str = field(metadata={"help": "Folder for table.md and the plots."})


@command
def main() -> None:
    (args,) = parse_arguments((ReportArguments,), __doc__)
    results = [read_result(path) for path in args.results]
    folder = Path(args.output_dir)
    plots = plot_results(results, folder)
    table = markdown_table(results)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print("\n".join(f"wrote {path}" for path in (folder / "table.md", *plots)))


if __name__ == "__main__":
    main()
