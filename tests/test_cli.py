"""The program `hf-relpos`: its sub-commands, what it costs to ask for help, and one line for each error."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import forked
import pytest
from conftest import ROOT, load_script

import hf_relpos
from hf_relpos import list_position_embeddings
from hf_relpos.cli import COMMANDS, main


SCRIPTS = {"push": "push_to_hub", "import": "import_model", "export": "export_model"}


def run(*words: str, program: tuple[str, ...] = ("-m", "hf_relpos"), **environment: str) -> subprocess.CompletedProcess:
    """The program in another process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, env=environment)


def output(monkeypatch, capsys, *words: str) -> str:
    """What the program prints in this process."""
    monkeypatch.setattr(sys, "argv", ["hf-relpos", *words])
    main()
    return capsys.readouterr().out


def error(monkeypatch, capsys, *words: str) -> str:
    """The one line that the program prints before it ends with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        output(monkeypatch, capsys, *words)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_sub_command_has_its_function(name):
    module, _, function = COMMANDS[name][0].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "schemes" and name != "serve"])
def test_a_script_is_the_same_function(name):
    module, _, function = COMMANDS[name][0].partition(":")
    script = SCRIPTS.get(name, name)
    assert load_script(script).main is getattr(import_module(module), function)


def test_help_and_version(monkeypatch, capsys):
    printed = output(monkeypatch, capsys, "--help")
    assert all(f"  {name} " in printed for name in COMMANDS) and printed.startswith("usage: hf-relpos ")
    assert output(monkeypatch, capsys, "--version") == f"hf-relpos {hf_relpos.__version__}\n"
    assert "show this help message" in run("report", "--help").stdout


LIGHT = [["--help"], ["--version"], ["trian"], *([name, "--help"] for name in ("report", "evaluate", "generate"))]


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_help_does_not_wait_for_torch(words):
    """As the installed program, whose path is the first word, and as a module."""
    installed = f"import sys; sys.argv = ['/bin/hf-relpos', *{words!r}]; from hf_relpos.cli import main; main()"
    for program in (("-c", installed), ("-m", "hf_relpos", *words)):
        done = run(program=("-X", "importtime", *program))
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "hf_relpos.cli" in loaded and not {"torch", "scipy", "matplotlib", "hf_relpos.model"} & loaded


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_help_of_training_imports_no_more_than_its_flags_need(name):
    """`TrainingArguments` needs torch; the models, and what transformers imports where it is installed, take longer."""
    done = run(name, "--help", program=("-X", "importtime", "-m", "hf_relpos"))
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"peft", "torchao", "transformers.modeling_utils", "transformers.trainer", "datasets", "hf_relpos.model"}
    assert done.returncode == 0 and "--max_steps" in done.stdout and not heavy & loaded


def test_help_hides_no_package_from_what_follows(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    with pytest.raises(SystemExit, match="0"):
        output(monkeypatch, capsys, "report", "--help")
    assert "pandas" not in sys.modules


def test_importing_registers_the_family_unless_it_is_the_program():
    code = (
        "import sys; sys.argv = {!r}\n"
        "import hf_relpos; print('torch' in sys.modules)\n"
        "{}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_config(AutoConfig.for_model('relpos', num_hidden_layers=1))).__name__)"
    )
    for argv, then, loaded in (
        (["train.py"], "", "True"),
        (["/bin/hf-relpos"], "from hf_relpos import PositionEmbedding", "False"),
    ):
        done = run(program=("-c", code.format(argv, then)))
        assert done.stdout.split() == [loaded, "RelPosForCausalLM"], done.stderr[-2000:]


def test_the_public_names_are_there():
    assert {*hf_relpos.__all__, "__version__"} <= set(dir(hf_relpos))
    assert all(getattr(hf_relpos, name) is not None for name in hf_relpos.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchName'"):
        hf_relpos.NoSuchName  # noqa: B018


def test_schemes_are_listed_with_kind_and_title(monkeypatch, capsys):
    lines = output(monkeypatch, capsys, "schemes").splitlines()
    assert [line.split()[0] for line in lines] == list_position_embeddings()
    (alibi,) = (line for line in lines if line.startswith("alibi "))
    assert alibi.split(maxsplit=2)[1:] == ["relative", "Attention with linear biases (ALiBi)."]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "hf-relpos: error: a sub-command is needed, one of schemes, check, compare, train"),
        (["trian"], "hf-relpos: error: unknown sub-command: 'trian' (did you mean 'train'?)"),
        (["xyz"], "hf-relpos: error: unknown sub-command: 'xyz'; --help lists"),
        (["--verson"], "hf-relpos: error: unknown sub-command: '--verson'"),
        (["train"], "hf-relpos train: error: --output_dir is required."),
        (
            ["report", "--output_dir", "x", "--result", "y"],
            "error: unknown flag: '--result' (did you mean '--results'?)",
        ),
        (
            ["evaluate", "--model_name_or_pth", "x"],
            "error: unknown flag: '--model_name_or_pth' (did you mean '--model_",
        ),
        (["evaluate", "--output_dir", "x"], "error: the following arguments are required: --model_name_or_path"),
        (["train", "output_dir=x"], "error: unknown flag: 'output_dir=x' (did you mean '--output_dir'?)"),
        (["train", "--output_dir", "x", "--optim", "adamw_torc"], ") (did you mean 'adamw_torch'?)"),
        (["schemes", "--config=c.yaml"], "hf-relpos schemes: error: --config 'c.yaml' does not exist"),
        (["schemes", "--import_file"], "hf-relpos schemes: error: --import_file takes Python files, NAME.py."),
        (["schemes", "--import_file", "no.py"], "`import_file` 'no.py' does not exist"),
        (["schemes", "--import-file", "no.py"], "`import_file` 'no.py' does not exist"),
        (["serve"], "hf-relpos: error: usage: hf-relpos serve DIR"),
        (["serve", "nothing", "--import_file", "no.py"], "hf-relpos: error: `import_file` 'no.py' does not exist"),
    ],
)
def test_an_error_is_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in error(monkeypatch, capsys, *words)


def test_a_file_of_flags_names_no_further_one(monkeypatch, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("config: other.yaml")
    words = ["schemes", "--config", str(tmp_path / "c.yaml")]
    assert "c.yaml' holds `config`: a file of flags names no further one" in error(monkeypatch, capsys, *words)


def test_a_flag_of_a_configuration_is_suggested_too(monkeypatch, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"output_dirs": "x"}))
    words = ["report", "--config", str(tmp_path / "c.yaml")]
    assert "an unknown flag: 'output_dirs' (did you mean 'output_dir'?)" in error(monkeypatch, capsys, *words)


def test_a_reader_that_has_gone_is_no_error():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = forked.start(["-m", "hf_relpos", "schemes"], env=environment, **pipes)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141 and "error:" not in errors and "Broken" not in errors and "Traceback" not in errors


def test_an_error_in_another_process(tmp_path):
    done = run("train", "--output_dir", str(tmp_path / "x"), "--no_such_flag", "1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hf-relpos train: error: unknown flag: '--no_such_flag'")
    assert not Path(tmp_path / "x").exists()
