"""Every flag that a message names is one of the command that it speaks to."""

import ast
import re

import pytest
from conftest import ROOT, load_script

from hf_relpos.cli import COMMANDS
from hf_relpos.command_help import make_parser


PACKAGE = ROOT / "hf_relpos"
# beginning of a file's name → the commands whose users read its messages; the longest that fits counts
SPEAKS_TO = {
    "data/": "train finetune evaluate",
    "data/tokens": "train compare",  # where a tokenizer is trained
    "demo/": "demo",
    "evaluation/": "evaluate",
    "experiments/": "sweep",
    "experiments/compar": "compare",
    "hub/": "push",
    "inference/": "serve",
    "inference/command": "generate",
    "inference/generate": "generate",
    "model_corpus": "finetune evaluate",
    "model_loading": "train finetune",  # of a run that was interrupted, "by its own command"
    "origin": "push",
    "pretrained/": "import",
    "results/": "report",
    "tasks/": "train finetune evaluate",
    "training/": "train finetune",
    "training/arguments": "finetune",
    "training/scheme_": "finetune",
}
OF_ALL = {"help", "config", "import_file", "debug", "version"}
SERVE = {"host", "port", "max_new_tokens", "continuous_batching"}  # of transformers, whose parser is another
# words of a message → the commands that it names by them
NAMES = {r"`?hf-relpos (\w+)": None, r"in training|training then": "train", r"of the server": "serve"}
# files whose words with two dashes are no flags of ours: of git
OTHERS = ("environment.py",)


def flags_of() -> dict[str, set[str]]:
    """Command → its flags."""
    reference, found = load_script("reference"), {"serve": OF_ALL | SERVE}
    for name in COMMANDS:
        if name != "serve":
            parser = make_parser(reference.asked(name)[0])
            found[name] = OF_ALL | {action.dest for action in parser._actions}
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    return flags_of()


def messages(path):
    """→ (line, text) of each string of a file but docstrings, with {} for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    skipped = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, holders) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def unknown_flags(text: str, commands: list[str], flags: dict[str, set[str]]) -> list[str]:
    """The flags that a message names and neither all of these commands nor one that it names itself have."""
    if re.search(r"<style>|var\(--|style=.--", text):  # properties of CSS
        return []
    named = set()
    for pattern, command in NAMES.items():
        for match in re.finditer(pattern, text):
            name = command or match[1]
            named |= flags.get(name, set())
    of_all = set.intersection(*(flags[name] for name in commands)) if commands else OF_ALL
    found = re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)
    return [flag for flag in found if flag.replace("-", "_") not in of_all | named]


def commands_of(path) -> list[str]:
    name = path.relative_to(PACKAGE).as_posix()
    fits = [start for start in SPEAKS_TO if name.startswith(start)]
    return SPEAKS_TO[max(fits, key=len)].split() if fits else []


def test_each_flag_of_a_message_exists_in_its_command(flags):
    paths = [path for path in PACKAGE.rglob("*.py") if path.name not in OTHERS]
    named, wrong = 0, []
    for path in paths:
        for line, text in messages(path):
            named += text.count("--")
            wrong += [(path.name, line, flag) for flag in unknown_flags(text, commands_of(path), flags)]
    assert named > 100 and not wrong


def test_a_flag_of_another_command_is_found(flags):
    assert unknown_flags("leave --private.", ["push"], flags) == []
    assert unknown_flags("leave --private.", ["push", "train"], flags) == ["private"]
    assert unknown_flags("leave --private (--hub_private_repo in training).", ["push"], flags) == []
    assert unknown_flags("give --train_file", ["compare"], flags) == ["train_file"]
    assert unknown_flags("--text of `hf-relpos compare`, or --train_files", ["train"], flags) == ["train_files"]
    names = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert all(any(name.startswith(start) for name in names) for start in SPEAKS_TO)
