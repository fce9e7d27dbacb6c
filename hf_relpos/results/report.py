"""The report of an experiment: the answer in words and one figure, then tables and figures over seeds, as Markdown and
as one HTML file."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli import command, parse_arguments, say_next
from ..environment import write_bytes, write_text
from .caveats import caveats
from .compared_rates import NOTE, edge_text, tried_rows
from .groups import Group, group_results, run_labels
from .plots import plot_results, plot_scores
from .questions import Answer, answers, detail_rows, pair_rows, sentences
from .report_figures import draw_figures
from .report_files import write_tables
from .report_page import Section, as_html, as_markdown
from .report_tables import Rows, context_rows, perplexity_rows, score_rows, setup_rows
from .result_file import (
    CONTEXT_NOTE,
    RESULTS,
    best_result,
    context_notes,
    corpus_note,
    escape_markdown,
    has_held_out_ends,
    markdown_table,
    read_readable,
    read_results,
    text_title,
)


def write_report(
    results: Sequence[dict[str, Any]],
    folder: Path,
    baseline: str | None = None,
    title: str = "Position schemes",
    varied: Sequence[str] = (),
    root: Path | None = None,
) -> list[Path]:
    """Writes report.md with its figures, report.html, which holds all in one file, and the tables as CSV and LaTeX.

    Args:
        results: of scripts/evaluate.py, any number of seeds of each setting.
        folder: where to write.
        baseline: label of the group whose loss by position is subtracted in the first figure; by default "none" if
            there is one, else the first.
        title: heading of the page.
        varied: fields of the recipe that the experiment varies, such as "recipe.learning_rate".
        root: of the experiment, by default the folder that `folder` lies in; a comparison keeps there the learning
            rates that it tried.

    Returns:
        the paths.

    Raises:
        ValueError: if the results cannot be compared, or if there is no such baseline.
    """
    groups = group_results(results, varied)
    labels = [group.label for group in groups]
    baseline = baseline or ("none" if "none" in labels else labels[0])
    if baseline not in labels:
        raise ValueError(f"`baseline` must be one of {labels}, got {baseline!r}.")
    summary = f"{_summary(groups)} {corpus_note(results, run_labels(results, varied))}"
    found, root = answers(groups), root or folder.absolute().parent
    table = score_rows(groups) if groups[0].score_name else perplexity_rows(groups)
    sections = _sections(groups, found, table, baseline, text_title(results))
    if rows := tried_rows(root):
        places = [section.heading for section in sections]
        tried = Section("Learning rates that were tried", [NOTE], rows, is_detail=True)
        sections.insert(places.index("What was trained") + 1, tried)
        sections[0].notes += [*filter(None, [edge_text(root)])]
    paths = [folder / "report.md", folder / "report.html"]
    write_text(paths[0], as_markdown(title, summary, sections, _footer(results)))
    write_text(paths[1], as_html(title, summary, sections, _footer(results)))
    for section in sections:
        if section.image:
            paths.append(folder / section.file_name)
            write_bytes(paths[-1], section.image)
    return paths + write_tables(groups, found, table, folder)


def _sections(groups: Sequence[Group], found: Sequence[Answer], table: Rows, baseline: str, text: str) -> list[Section]:
    """What the page holds, in its order."""
    figures = draw_figures(groups, baseline)
    first, rest = (figures[:1], figures[1:]) if len(groups) > 1 else ([], figures)
    notes = [line for answer in found for line in sentences(answer)]
    sections = [Section("Answer", notes=[*notes, *caveats(groups)])]
    sections += [Section(each.heading, image=each.image, caption=each.caption) for each in first]
    if groups[0].score_name:
        note = f"{text}. {groups[0].score_name}, by the length of the rows in tokens and their kind, with the 95 % "
        note += "interval over the seeds, which ignores the limits 0 and 1."
        sections.append(Section("Score by length", [note], table))
    else:
        sections.append(Section("Perplexity by length", [_perplexity_note(groups, text)], table))
    sections += [_pair_section(answer, text) for answer in found if answer.pairs]
    sections.append(Section("What was trained", [], setup_rows(groups)))
    if not groups[0].score_name:
        note = f"{text}. {CONTEXT_NOTE} Intervals over the seeds."
        sections.append(Section("Use of the context", [note], context_rows(groups, baseline), is_detail=True))
    sections += [Section(each.heading, image=each.image, caption=each.caption, is_detail=True) for each in rest]
    for answer in found:
        if answer.pairs:
            heading = f"All pairs: {answer.question.title}"
            sections.append(Section(heading, [_test_note(answer)], detail_rows(answer), is_detail=True))
    return [section for section in sections if section.rows is None or len(section.rows) > 1]


def _perplexity_note(groups: Sequence[Group], text: str) -> str:
    documents = max(group.num_documents for group in groups)
    note = f"{text}. All lengths are scored on the same tokens. In brackets the 95 % interval, "
    if has_held_out_ends(groups[0].first):
        number = f"{documents} documents" if documents > 1 else "one document"
        note += f"which holds for new seeds and no new documents: the ends of {number} whose beginnings were trained "
        note += "on were read. "
    elif documents > 1:
        note += f"which holds for new seeds and new documents ({documents} documents were read{_short(groups)}). "
    else:
        note += "which holds for new seeds on this text. "
    note += "Ratio: perplexity at the longest length / at the training length."
    if any(group.has_sliding_baseline for group in groups):
        note += " Sliding: rows of the training length that move by its half, so that no token is read past it and few "
        note += "have little context: what falls from the training length to a longer one, and not from here, is that "
        note += "longer rows have fewer beginnings."
    unigram = groups[0].first.get("unigram_loss")
    return note + (f" The frequencies of tokens alone give {math.exp(unigram):.1f}." if unigram else "")


def _short(groups: Sequence[Group]) -> str:
    """ "; 15 shorter than 1024 tokens cannot be" """
    short = groups[0].first["corpus"].get("num_short_documents")
    return f"; {short} shorter than {groups[0].lengths()[-1]} tokens cannot be" if short else ""


def _pair_section(answer: Answer, text: str) -> Section:
    unit = "score" if answer.question.is_score else "perplexity"
    note = f"{text}. Row against column: difference of the {unit} {answer.question.place}; * where it is resolved at "
    note += f"5 % over all {len(answer.pairs)} pairs together."
    return Section(answer.question.title, [note], pair_rows(answer))


def _test_note(answer: Answer) -> str:
    crossed = max(pair.difference.num_documents for pair in answer.pairs) > 1
    how = "runs and documents crossed, degrees of freedom by Satterthwaite" if crossed else "Student's t over the runs"
    return f"Paired by seed; {how}; p corrected for {len(answer.pairs)} pairs by Holm's method."


FEW_SEEDS = {
    1: " One seed says nothing of other seeds.",
    2: " With two seeds the intervals are wide: what is resolved is large beside the scatter between seeds.",
}


def _summary(groups: Sequence[Group]) -> str:
    seeds = sorted({len(group.by_seed) for group in groups})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    num_runs = sum(len(group.by_seed) for group in groups)
    text = f"{len(groups)} settings, {count} seed{'s' * (seeds[-1] > 1)} each, {num_runs} runs."
    return text + FEW_SEEDS.get(seeds[0], "")


def _footer(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]
    machines = sorted({result["hardware"].get("gpu", result["hardware"]["cpu"]) for result in results})
    seconds = sum((result["training"] or {}).get("seconds", 0) for result in results)
    corpus = first["corpus"]
    return (
        f"Corpus {corpus['name']} ({corpus.get('split')}, {corpus.get('num_windows')} windows), trained on "
        f"{', '.join(machines)} in {seconds / 3600:.1f} hours."
    )


# --- the command


DESCRIPTION = """\
Makes tables and plots of several result files of `hf-relpos evaluate`; of the folder of `hf-relpos sweep` or `hf-relpos
compare`, statistics over the seeds.

hf-relpos report --results output/*/results.json --output_dir output/report
hf-relpos report --sweep output/relative --output_dir output/report
"""


@dataclass
class ReportArguments:
    """Which results, and where the report goes."""

    output_dir: str = field(metadata={"help": "Folder for the tables and the plots."})
    results: list[str] = field(
        default_factory=list, metadata={"help": "Result files, .json or .jsonl: a row for each run."}
    )
    sweep: str | None = field(
        default=None,
        metadata={
            "help": "Output folder of `hf-relpos sweep` or `hf-relpos compare`: statistics over the seeds, as "
            "report.html and report.md, and the tables as CSV and LaTeX."
        },
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Setting whose loss by position is subtracted; none or the first by default."}
    )
    varied: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of the recipe that a sweep varies, such as recipe.learning_rate, or training.corpus; "
            "others must agree."
        },
    )
    title: str = field(default="Position schemes", metadata={"help": "Heading of the page of a sweep."})


@command
def main() -> None:
    (args,) = parse_arguments((ReportArguments,), DESCRIPTION)
    folder = Path(args.output_dir)
    if bool(args.results) == bool(args.sweep):
        raise ValueError("either --results or --sweep is required.")
    for name in ("baseline", "title"):
        if args.results and getattr(args, name) != getattr(ReportArguments, name):
            raise ValueError(f"`{name}` is for --sweep: a table of --results has none.")
    if args.sweep:
        results = read_results(_results_of_sweep(Path(args.sweep)))
        names = run_labels(results, args.varied)
        paths = write_report(results, folder, args.baseline, args.title, args.varied, Path(args.sweep))
        for answer in answers(group_results(results, args.varied)):
            print("\n".join(line.replace("**", "") for line in sentences(answer)))
        for line in filter(None, [edge_text(Path(args.sweep)), *caveats(group_results(results, args.varied))]):
            print(line)
    else:
        results, errors = read_readable(args.results)
        if not results:
            raise ValueError("no result can be read: " + "; ".join(errors))
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)
        names = run_labels(results, args.varied)
        table = markdown_table(results, names)
        notes = [*context_notes(results), corpus_note(results, names)]
        write_text(folder / "table.md", "\n\n".join([table, *map(escape_markdown, notes)]) + "\n")
        print("\n".join([table, *context_notes(results)]))
        paths = [folder / "table.md", *(plot_scores if "task" in results[0] else plot_results)(results, folder, names)]
    print("\n".join([*(f"wrote {path}" for path in paths), corpus_note(results, names)]))
    if model := _best_model(args, results):
        say_next("push", model, f"your-name/{model.resolve().name}", dry_run="true")


def _best_model(args: ReportArguments, results: Sequence[dict[str, Any]]) -> Path | None:
    """→ the folder of the model with the best result, if it lies where a sweep or an evaluation was told to put it."""
    name = str(best_result(results).get("model"))
    places = [Path(args.sweep) / "runs" / name] if args.sweep else []
    places += [folder for path in args.results for folder in Path(path).parents[:2]]
    return next((each for each in places if each.resolve().name == name and (each / "config.json").is_file()), None)


def _results_of_sweep(folder: Path) -> Path:
    if not (folder / RESULTS).is_file():
        raise ValueError(f"`sweep` {str(folder)!r} holds no finished sweep: there is no {RESULTS}.")
    return folder / RESULTS
