"""What the code promises about itself: which file may import what, and that the README tells the truth."""

import ast
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import yaml
from conftest import ROOT

from hf_relpos import __version__, list_position_embeddings
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.results.comparable import fields_to_vary
from hf_relpos.results.compared_rates import read_tried
from hf_relpos.results.groups import group_results
from hf_relpos.results.questions import answers, sentences
from hf_relpos.results.report import write_report
from hf_relpos.results.report_tables import context_rows, exp_cell, perplexity_rows, score_rows
from hf_relpos.results.result_file import RESULTS, markdown, read_results


PACKAGE = ROOT / "hf_relpos"
# place → the places it may import; imports inside functions count. A place imports only those above it, so no circle
CONTRACT = {
    "native": "",
    "model": "native",
    "environment": "",
    "messages": "environment",
    "command_help": "",
    "processes": "",
    "special_tokens": "",
    "file_reading": "",
    "origin": "",
    "scheme_files": "model file_reading",
    "scheme_docs": "model",
    "scheme_trials": "model",
    "scheme_check": "model scheme_docs scheme_files scheme_trials",
    "cli": "model scheme_files file_reading environment messages command_help",
    "__main__": "cli",
    "check_command": "scheme_check scheme_files cli file_reading",
    "model_loading": "model file_reading",
    "pretrained": "model cli file_reading environment origin",
    "data": "model model_loading environment special_tokens",
    "inference": "model model_loading cli special_tokens file_reading environment messages",
    "tasks": "data special_tokens",
    "results": "environment cli file_reading",
    "model_corpus": "data tasks results environment file_reading",
    "hub": "model model_loading results scheme_docs environment cli file_reading messages origin",
    "evaluation": "model model_loading pretrained special_tokens data tasks results environment cli scheme_files "
    "model_corpus hub messages",
    "demo": "model model_loading evaluation inference results cli model_corpus origin",
    "training": "model model_loading pretrained special_tokens data tasks results hub environment processes cli "
    "scheme_check scheme_files model_corpus file_reading messages",
    "experiments": "model model_loading data tasks training evaluation results environment processes cli scheme_check "
    "scheme_files file_reading messages model_corpus",
}


def place_of(module: str) -> str:
    """ "hf_relpos.model.scheme_base" → "model"."""
    return module.split(".")[1] if "." in module else ""


def imported(path):
    """→ (module, line) of every import in a file, those in functions and in `try` among them; full names."""
    package = [*path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            yield ".".join([*start, *filter(None, [node.module])]), node.lineno


def test_no_place_may_import_what_may_import_it():
    places = list(CONTRACT)
    for index, (place, allowed) in enumerate(CONTRACT.items()):
        assert set(allowed.split()) <= set(places[:index]), place


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        here = place_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module, line in imported(path):
            if module.partition(".")[0] == "hf_relpos" and here != "__init__":
                allowed = {here, *CONTRACT[here].split()}
                assert place_of(module) in allowed, f"{path.relative_to(ROOT)}:{line} imports {module}"


def test_a_saved_folder_needs_torch_and_transformers_only():
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "triton", "hf_relpos"}
    for path in (PACKAGE / "model").glob("*.py"):
        assert {module.partition(".")[0] for module, _ in imported(path)} <= allowed, path.name
        # the Hub's loader follows these lines wherever they stand, in a docstring too
        for line in path.read_text(encoding="utf-8").splitlines():
            followed = re.match(r"\s*from\s+\.(\S*)\s+import", line)
            assert not followed or ((PACKAGE / "model" / f"{followed[1]}.py").is_file() and line.startswith("from "))


@pytest.mark.parametrize(
    "name",
    [
        "modeling_relpos",
        "attention_plan",
        "decoder_layer",
        "saved_code",
        "attention_distance_bias",
        "configuration_relpos",
        "token_positions",
        "key_positions",
    ],
)
def test_no_scheme_is_named_where_schemes_are_used(name):
    tree = ast.parse((PACKAGE / "model" / f"{name}.py").read_text(encoding="utf-8"))
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docstrings}
    allowed = {"configuration_relpos": {"linear_cpb"}}  # the default
    assert named & set(list_position_embeddings()) <= allowed.get(name, set())


def test_importing_the_model_needs_no_library_file():
    code = (
        "import sys, hf_relpos; print([m for m in ('datasets', 'evaluate', 'matplotlib', 'yaml') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "datasets" not in loaded and "evaluate" not in loaded and "matplotlib" not in loaded


def test_results_need_neither_torch_nor_matplotlib():
    for path in (PACKAGE / "results").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not {str(name).partition(".")[0] for name in names} & {"torch", "transformers", "scipy", "matplotlib"}


# --- the README


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_scheme():
    assert not [name for name in list_position_embeddings() if f"`{name}`" not in README]


def test_readme_answers_in_one_screen():
    """Its words, without code: a newcomer reads it in five minutes; the first lines say how to install."""
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 1500
    assert "pip install" in "\n".join(README.splitlines()[:12])


def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    before, scope = set(POSITION_EMBEDDINGS), {}
    try:
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), scope)  # one after the other, as one reads them
    finally:
        for name in set(POSITION_EMBEDDINGS) - before:
            del POSITION_EMBEDDINGS[name]


def test_readme_names_files_that_exist():
    for path in set(re.findall(r"\b(?:scripts|docs|hf_relpos|tests)/[\w./]+\w", README)):
        assert (ROOT / path).exists(), path
    for target in ("make demo", "make test"):
        assert target in README and re.search(rf"^{target.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


# --- the results


EXPERIMENTS = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/report.md"))


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_reports_are_made_from_the_result_files(folder, tmp_path):
    results = read_results(folder / RESULTS)
    stored = (folder / "report.md").read_text(encoding="utf-8")
    title = stored.partition("\n")[0].removeprefix("# ")
    written = write_report(results, tmp_path, title=title, varied=("recipe.learning_rate",))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == stored
    assert all((folder / path.name).is_file() for path in written if path.suffix == ".png")


def test_the_results_take_little_room():
    """A clone stays small, compressed as it is sent: one result file per experiment, one card per setting, small
    figures."""
    paths = [path for folder in ("docs", "model_cards") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert sum(len(zlib.compress(path.read_bytes())) for path in paths) < 2_000_000
    assert max(path.stat().st_size for path in paths if path.suffix == ".png") < 120_000


def test_the_results_page_holds_no_other_figure():
    """Each line of a table, and each sentence of an answer, stands in a report or is made from the result files."""
    reports = "".join((folder / "report.md").read_text(encoding="utf-8") for folder in EXPERIMENTS)
    for path in sorted((ROOT / "docs" / "results").rglob(RESULTS)):
        if path.parent not in EXPERIMENTS and path.parent.name not in ("finetune", "books_learning_rates"):
            reports += comparison_lines(read_results(path))
    reports += comparison_lines(all_schemes()) + comparison_lines(training_lengths())
    reports += "\n".join(finetuning_lines(read_results(ROOT / "docs" / "results" / "finetune" / RESULTS)))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    begins = ("| ", "- Best at ", "- Worse, ", "- Not resolved ", "- No setting ", "- The same ", "- From ")
    said = [line for line in page.splitlines() if line.startswith(begins)]
    others = [line for line in said if line not in reports and "---" not in line]
    results = read_results(ROOT / "docs" / "results" / "books_learning_rates" / RESULTS)
    found = {(group.label, rate): perplexity for group, rate, perplexity in learning_rates(results)}
    head, *rows = [line for line in others if not line.startswith("- ")]
    rates = [float(cell) for cell in head.strip("| ").split(" | ")[1:]]
    shown = {}
    for row in rows:
        label, *cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
        shown |= {(label, rate): cell for rate, cell in zip(rates, cells) if cell != "–"}
    assert len(shown) == len(results) > 30 and len(said) > len(rows) + 20
    assert shown == {key: f"{perplexity:.2f}" for key, perplexity in found.items()}


def all_schemes():
    """The results of every scheme on books, with the three seeds that all of them have."""
    nine, others = (read_results(ROOT / "docs" / "results" / name / RESULTS) for name in ("books", "books_others"))
    return [result for result in nine if result["seed"] in {each["seed"] for each in others}] + others


def training_lengths():
    """The runs at several training lengths, and those of the same schemes and seeds at 128 tokens, on books."""
    books, others = (read_results(ROOT / "docs" / "results" / name / RESULTS) for name in ("books", "books_context"))
    seeds, schemes = ({each[name] for each in others} for name in ("seed", "pos_embedding_type"))
    groups = [group for group in group_results(books, ("recipe.learning_rate",)) if group.label in schemes]
    groups.sort(key=lambda group: [each["pos_embedding_type"] for each in others].index(group.label))
    return [result for group in groups for result in group.by_seed.values() if result["seed"] in seeds] + others


def comparison_lines(results):
    """The tables and the answers of a report on them."""
    groups = group_results(results, ("recipe.learning_rate",))
    tables = [score_rows(groups) if groups[0].score_name else perplexity_rows(groups)]
    if len({group.train_length for group in groups}) > 1:
        tables.append(context_rows(groups, groups[0].label))
    answered = [f"- {line}" for answer in answers(groups) for line in sentences(answer)]
    return "\n".join(["", *map(markdown, tables), *answered])


def finetuning_groups(results):
    """Label, block size and number of steps → group. Three kinds of runs read the data in orders of their own: those of
    fewer than 500 steps, those in rows of 128 tokens and the others."""
    found, names = {}, {"linear": "rotary, PI", "yarn": "rotary, YaRN"}
    for kind in ("short", "at 128", "longer"):
        part = [result for result in results if finetuning_kind(result["training"]) == kind]
        for group in group_results(part, fields_to_vary(part)):
            training = group.first["training"]
            scheme, rope = training["pos_embedding_type"], (training["rope_parameters"] or {}).get("rope_type")
            label = "DroPE" if scheme == "none" else names.get(rope, scheme)
            found[label, training["flags"].get("block_size", 128), training["num_steps"]] = group
    return found


def finetuning_kind(training):
    if training["num_steps"] < 500:
        return "short"
    return "longer" if training["block_size"] > 128 else "at 128"


def finetuning_lines(results):
    """The rows of the tables of finetuning: perplexity at 1024 tokens, and learning rates, by block size and steps."""
    cells, rates = {}, {}
    for (label, block, count), group in finetuning_groups(results).items():
        values = np.stack(list(group.losses(1024).values()))
        cells.setdefault((block, label), {})[count] = exp_cell(values, group.document_weights, 2)
        rates.setdefault(f"{label} {block}", {})[count] = f"{group.first['training']['recipe']['learning_rate']:g}"
    for rows, first in ((cells, 0), (rates, 1)):
        steps = sorted({count for row in rows.values() for count in row})[first:]
        for name, row in rows.items():
            yield f"| {name if first else name[1]} | {' | '.join(row.get(count, '–') for count in steps)} |"
        yield f"| setting | {' | '.join(f'{count} steps' if count else 'untrained' for count in steps)} |"


def test_the_rates_of_finetuning_and_of_long_trainings_are_the_best_of_those_tried():
    """The lowest validation loss that was tried for a setting, at no edge of what was tried."""
    finetuned, long = ROOT / "docs" / "results" / "finetune", ROOT / "docs" / "results" / "books_xsmall_long"
    tried, of_long = read_tried(finetuned), read_tried(long)
    groups = finetuning_groups(read_results(finetuned / RESULTS)).items()
    found = {f"{label} {block}, {count} steps": group for (label, block, count), group in groups if count >= 500}
    assert found.keys() == tried.keys() and len(found) == 25
    found_long = {
        group.label: group for group in group_results(read_results(long / RESULTS), ("recipe.learning_rate",))
    }
    assert of_long.keys() - found_long.keys() == {"alibi"} and len(found_long) == 4
    tried |= of_long
    for name, group in (found | found_long).items():
        best = min(tried[name], key=tried[name].get)
        assert group.first["training"]["recipe"]["learning_rate"] == best
        assert best not in (min(tried[name]), max(tried[name]))


def learning_rates(results):
    """→ group of one learning rate, that rate and the perplexity at 128."""
    for rate in sorted({float(result["training"]["recipe"]["learning_rate"]) for result in results}):
        tried = [result for result in results if float(result["training"]["recipe"]["learning_rate"]) == rate]
        for group in group_results(tried):
            yield group, rate, group.first["lengths"]["128"]["perplexity"]


# --- the release


def test_the_version_stands_in_one_place_and_has_its_changes():
    heading = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading[1] in (__version__, "Unreleased") and (PACKAGE / "py.typed").is_file()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and "version" not in citation
