"""The guides: every command in them is one that its program takes, and scripts/run_guides.py runs every page."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script

from hf_relpos import cli


GUIDES = load_script("run_guides")
BLOCKS = [block for page in ("README", *GUIDES.GUIDES) for block in GUIDES.read_blocks(page)]
COMMANDS = [
    (block.page, line)
    for block in BLOCKS
    if block.language == "bash"
    for line in block.commands()
    if re.match(r"(hf-relpos|accelerate launch .*scripts/train\.py) ", line)
]


class Parsed(Exception):
    """The flags were taken."""


def test_each_page_that_has_commands_is_run():
    pages = {
        path.stem
        for path in (ROOT / "docs").glob("*.md")
        if re.search(r"^```(bash|python)\n", path.read_text(encoding="utf-8"), re.M)
    }
    assert pages <= set(GUIDES.GUIDES)
    assert all((ROOT / "docs" / f"{page}.md").is_file() for page in GUIDES.GUIDES)


def test_the_site_has_every_page():
    site = yaml.safe_load(re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = re.findall(r"\w+\.md", str(site["nav"]))
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_each_training_that_is_shown_has_a_length_that_fits():
    """The default is that of the notebook: ten hours on two cores. Two pages are of what is run on GPUs."""
    places = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("hf_relpos/**/commands.py"), Path(cli.__file__)]
    places = [path for path in places if path.name not in ("scale.md", "pretrained.md")]
    shown = []
    for path in places:
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        shown += [(path.name, line) for line in re.findall(r"hf-relpos (?:train|finetune) --[^`\n]*", text)]
    assert len(shown) > 10
    for name, line in shown:
        assert re.search("--max_steps|--num_train_epochs|--config |--help|…", line), (name, line)
    readme = next(line for name, line in shown if name == "README.md" and line.startswith("hf-relpos train"))
    assert "--train_file " in readme


def test_resolved_is_explained_where_it_is_first_read():
    for name in ("README.md", "docs/experiments.md", "docs/choosing.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split()).replace("*", "").replace('"', "")
        assert re.search(r"Resolved( means)?(:| that), at 5 %|Resolved means: at 5 %|Resolved: at 5 %", text), name
        assert "would give the same sign" in text and ("alike" in text), name


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{page}-{index}" for index, (page, _) in enumerate(COMMANDS)])
def test_a_command_of_a_guide_is_taken(page, line, monkeypatch, tmp_path):
    """By the parser of its program, which is stopped before it does anything."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    name, flags = (
        ("train", words[words.index("scripts/train.py") + 1 :]) if words[0] == "accelerate" else (words[1], words[2:])
    )
    if name == "serve":
        return
    if "--lora_rank" in words:
        pytest.importorskip("peft")
    assert name in cli.COMMANDS
    module, _, function = cli.COMMANDS[name][0].partition(":")
    module = importlib.import_module(module, "hf_relpos")

    def parse(*args, **kwargs):
        monkeypatch.setattr(cli, "import_schemes", lambda files: None)
        cli.parse_arguments(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(module, "parse_arguments", parse)
    monkeypatch.setattr("sys.argv", [f"hf-relpos {name}", *flags])
    monkeypatch.setattr("sys.exit", lambda code: None)
    with pytest.raises(Parsed):
        getattr(module, function or "main").__wrapped__()
