"""What the code promises about itself: which file may import what, and that the README tells the truth."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from hf_relpos import list_position_embeddings
from hf_relpos.position_base import POSITION_EMBEDDINGS
from hf_relpos.report_page import write_report
from hf_relpos.results import markdown_table, read_result


PACKAGE = ROOT / "hf_relpos"
# files that go to the Hub with a model → those of them that each may import
HUB_FILES = {
    "position_base": set(),
    "position_absolute": {"position_base"},
    "position_rotary": {"position_base"},
    "position_bias": {"position_base"},
    "position_content": {"position_base", "position_bias"},
    "position_fire": {"position_base", "position_bias"},
    "positions": {
        "position_base",
        "position_absolute",
        "position_rotary",
        "position_bias",
        "position_content",
        "position_fire",
    },
    "position_ids": {"position_base"},
    "position_sampling": set(),
    "attention_cpu": set(),
    "attention_blocks": {"attention_cpu"},
    "attention_triton": set(),
    "attention_keys": set(),
    "transformers_versions": set(),
    "loss_relpos": set(),
    "attention_relpos": {"attention_blocks", "attention_cpu", "attention_triton"},
    "configuration_relpos": {"position_base", "position_sampling", "positions"},
    "sharing_relpos": {"configuration_relpos", "positions"},
    "layers_relpos": {
        "attention_keys",
        "attention_relpos",
        "configuration_relpos",
        "position_base",
        "positions",
        "transformers_versions",
    },
    "kinds_relpos": {
        "attention_keys",
        "attention_relpos",
        "position_base",
        "position_ids",
        "position_sampling",
        "positions",
        "transformers_versions",
    },
    "modeling_relpos": {
        "attention_relpos",
        "configuration_relpos",
        "kinds_relpos",
        "layers_relpos",
        "loss_relpos",
        "position_base",
        "position_ids",
        "positions",
        "sharing_relpos",
        "transformers_versions",
    },
}
# library files → those of them that each may import, besides what the package makes public
LIBRARY_FILES = {
    "cli": set(),
    "benchmark_cases": {
        "attention_relpos",
        "attention_triton",
        "configuration_relpos",
        "evaluation",
        "modeling_relpos",
        "position_bias",
        "positions",
    },
    "benchmarking": {"benchmark_cases"},
    "benchmark_report": set(),
    "data": set(),
    "packing": {"data"},
    "evaluation": set(),
    "generation": set(),
    "results": set(),
    "recording": {"data", "results"},
    "model_card": {"positions", "recording", "results", "schemes_page", "sharing_relpos"},
    "repository": {
        "configuration_relpos",
        "model_card",
        "modeling_relpos",
        "recording",
        "results",
        "saved_models",
        "sharing_relpos",
    },
    "publishing": {"model_card", "recording", "repository"},
    "saved_models": {"data", "packing", "configuration_relpos", "modeling_relpos", "position_sampling"},
    "changing_schemes": {
        "configuration_relpos",
        "data",
        "modeling_relpos",
        "position_rotary",
        "positions",
        "saved_models",
    },
    "training": {
        "changing_schemes",
        "data",
        "packing",
        "publishing",
        "recording",
        "results",
        "saved_models",
        "synthetic",
        "attention_cpu",
        "configuration_relpos",
        "modeling_relpos",
    },
    "perplexity_by_length": {"evaluation"},
    "synthetic": {"data", "evaluation"},
    "evaluating": {"data", "evaluation", "packing", "recording", "results", "saved_models", "synthetic"},
    "comparing": {"results"},
    "schemes_page": {
        "attention_relpos",
        "configuration_relpos",
        "modeling_relpos",
        "position_base",
        "positions",
        "results",
    },
    "report_page": {"comparing", "results"},
    "sweeping": {
        "changing_schemes",
        "cli",
        "configuration_relpos",
        "data",
        "evaluating",
        "recording",
        "results",
        "saved_models",
        "synthetic",
        "training",
    },
    "demo": {"demo_parts", "modeling_relpos", "saved_models"},
    "demo_parts": {"evaluation", "generation", "modeling_relpos", "results"},
    "serving": {"attention_relpos", "cli", "configuration_relpos", "modeling_relpos"},
}


def imports(name):
    """→ the package's own modules that a file imports, and the others, without those that it only tries to import."""
    own, others = set(), set()
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    tried = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
    for node in set(ast.walk(tree)) - tried:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("hf_relpos")):
            assert node.level <= 1 and node.module, f"{name}: flat imports of the form `from .name import x` only"
            own.add(node.module.removeprefix("hf_relpos."))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
    return own, others


def test_every_file_is_accounted_for():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*HUB_FILES, *LIBRARY_FILES, "__init__"}


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_need_torch_and_transformers_only(name):
    own, others = imports(name)
    assert own <= HUB_FILES[name]
    assert others - set(sys.stdlib_module_names) <= {"torch", "transformers"}
    # the Hub's loader follows these lines wherever they stand, in a docstring too
    for line in (PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines():
        followed = re.match(r"\s*from\s+\.(\S*)\s+import", line)
        assert not followed or (followed[1] in HUB_FILES and line.startswith("from "))


@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_library_files_import_one_way(name):
    own, _ = imports(name)
    assert own <= LIBRARY_FILES[name]


@pytest.mark.parametrize(
    "name",
    [
        "modeling_relpos",
        "kinds_relpos",
        "layers_relpos",
        "sharing_relpos",
        "attention_relpos",
        "configuration_relpos",
        "position_ids",
    ],
)
def test_no_scheme_is_named_where_schemes_are_used(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
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


# --- the README


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_a_row_for_each_scheme():
    head, *rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert head == "pos_embedding_type" and rows == list_position_embeddings()
    for name, scheme in POSITION_EMBEDDINGS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", README, flags=re.MULTILINE)
        assert scheme.extrapolates in row and scheme.kind in row


def test_readme_table_is_made_from_the_result_files():
    results = [
        json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("none", "linear_cpb", "alibi", "rotary")
    ]
    assert markdown_table(results) in README
    assert len({result["training"]["num_tokens"] for result in results}) == 1
    assert (ROOT / "docs" / "results" / "loss_by_position.png").is_file()


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


EXPERIMENTS = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/results.txt"))


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_reports_are_made_from_the_result_files(folder, tmp_path):
    results = [read_result(folder / name) for name in (folder / "results.txt").read_text().split()]
    stored = (folder / "report.md").read_text(encoding="utf-8")
    written = write_report(results, tmp_path, title=stored.partition("\n")[0].removeprefix("# "))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == stored
    assert all((folder / path.name).is_file() for path in written if path.suffix == ".png")


def test_the_results_page_holds_no_other_figure():
    """Each line of a table stands in a report, or beside the notebook with the ratio that a report has."""
    reports = "".join((folder / "report.md").read_text(encoding="utf-8") for folder in EXPERIMENTS)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    others = [line for line in lines if line not in reports and "---" not in line and "notebook" not in line]
    assert lines and others
    books = (ROOT / "docs" / "results" / "books" / "report.md").read_text(encoding="utf-8")
    ratios = dict(re.findall(r"^\| ([^|]+) \| \d+ \|.*\| ([\d.]+) ± [^|]*\|$", books, re.MULTILINE))
    for line in others:
        name, ours, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        assert ratios[name] == ours, line
