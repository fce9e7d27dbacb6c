"""A scheme in a file of the user's: the guide's example runs, trains, and travels in the folders that are saved."""

import json
import os
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import forked
import pytest
import torch
import yaml
from conftest import ROOT, make_model, make_tokens
from helpers import TINY, run_without_the_package, training_flags
from transformers import AutoModelForCausalLM

from hf_relpos import PositionEmbedding, check_position_embedding, register_position_embedding
from hf_relpos.hub.repository import repository_files
from hf_relpos.model.saved_code import code_files, foreign_schemes, saved_code
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.scheme_files import import_scheme_file, imported_files
from hf_relpos.training.recipe import _hashes


GUIDE = (ROOT / "docs" / "own_scheme.md").read_text(encoding="utf-8")
(EXAMPLE,) = (code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "class LogDecay" in code)
LOAD = """
import torch, transformers
folder, tokens, logits = sys.argv[1:]
tokens, expected = torch.load(tokens), torch.load(logits)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(tokens).logits, expected)
for number in range(2):  # saved from the loaded code, twice
    folder += f"/again-{number}"
    model.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(tokens).logits, expected)
print(model.config.pos_embedding_type)
"""
BIAS = "def distance_bias(self, distance):\n        return -distance.float().expand(6, -1)"


@pytest.fixture(autouse=True)
def registry():
    """What a test registers and imports is gone after it."""
    schemes, modules, files = dict(POSITION_EMBEDDINGS), set(sys.modules), set(imported_files())
    yield
    for name in set(POSITION_EMBEDDINGS) - set(schemes):
        module = POSITION_EMBEDDINGS.pop(name).__module__
        if module not in modules:
            sys.modules.pop(module, None)
    assert set(imported_files()) <= files


@pytest.fixture
def example(tmp_path):
    """→ my_scheme.py, as the guide has it."""
    path = tmp_path / "my_scheme.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    return path


def write(path: Path, name: str, text: str = "", top: str = "", body: str = BIAS) -> Path:
    """→ a file that registers a scheme."""
    path.write_text(
        f"from hf_relpos import PositionEmbedding, register_position_embedding\n{top}\n\n"
        f"@register_position_embedding({name!r})\nclass Own(PositionEmbedding):\n"
        f'    """{text or "A scheme."}"""\n    {body}\n',
        encoding="utf-8",
    )
    return path


def hf_relpos(*words: object, cwd: Path, code: int = 0) -> CompletedProcess:
    """The command line in another process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(cwd / "modules")}
    done = forked.run(["-m", "hf_relpos", *words], cwd=cwd, env=environment)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def data_flags(corpus_files) -> list[object]:
    return ["--train_file", corpus_files / "train", "--validation_file", corpus_files / "valid.txt"]


def test_the_example_runs_as_it_stands(example):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = forked.run([example.name], cwd=example.parent, env=environment)
    assert done.returncode == 0 and "torch.Size([1, 16, 8192])" in done.stdout, done.stderr


def test_the_example_is_trained_saved_loaded_and_finetuned(example, corpus_files, tmp_path, without_native):
    """With the command of the guide; the folder loads without the package, and from its own file with it."""
    common = {"max_steps": 2, "save_steps": 2, "eval_steps": 2}
    flags = training_flags(data_flags(corpus_files), "trained", pos_embedding_type="log_decay", **common)
    hf_relpos("train", "--import_file", "my_scheme.py", *flags, cwd=tmp_path)
    folder = tmp_path / "trained"
    assert json.loads((folder / "training.json").read_text())["flags"]["import_file"] == ["my_scheme.py"]
    carried = (folder / "my_scheme.py").read_text(encoding="utf-8")
    assert "from .scheme_base import PositionEmbedding, register_position_embedding" in carried
    assert "__main__" not in carried and "hf_relpos" not in carried and "RelPosConfig" not in carried

    refused = hf_relpos("generate", "--model_name_or_path", "trained", "--prompt", "the", cwd=tmp_path, code=2)
    assert refused.stderr.splitlines()[-1].endswith("give --import_file trained/my_scheme.py")
    import_scheme_file(folder / "my_scheme.py")
    model, tokens = AutoModelForCausalLM.from_pretrained(folder), make_tokens(2, 9)
    torch.save(tokens, tmp_path / "tokens.pt")
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    arguments = (folder, tmp_path / "tokens.pt", tmp_path / "logits.pt")
    assert run_without_the_package(LOAD, *arguments, cwd=tmp_path, modules=tmp_path / "cache").split() == ["log_decay"]

    changed = {"vocab_size": None, "config_overrides": None, "model_name_or_path": "trained"}
    flags = training_flags(data_flags(corpus_files), "longer", **common, **changed, block_size=48)
    hf_relpos("finetune", "--import_file", "trained/my_scheme.py", *flags, cwd=tmp_path)
    assert (tmp_path / "longer" / "my_scheme.py").read_text(encoding="utf-8") == carried
    files = repository_files(tmp_path / "longer", "someone/longer")
    assert files["my_scheme.py"] == carried.encode() and b"import LogDecay" in files["scheme_registry.py"]
    card = files["README.md"].decode()
    assert "A bias that falls with the logarithm of the distance" in card and "b[h, d] = −s_h · ln(1 + d)" in card
    assert "--import_file my_scheme.py" in card and 'import_scheme_file("my_scheme.py")' in card


def test_a_recipe_tells_the_content_of_the_file(example, tmp_path):
    """So that a run does not go on with another scheme of the same name; the copy in its folder is the same."""

    def hashes(path):
        module = import_scheme_file(path)
        config = SimpleNamespace(pos_embedding_type="log_decay")
        run = SimpleNamespace(model=SimpleNamespace(config=config), data=SimpleNamespace(tokenizer=None))
        run.model_args = SimpleNamespace(model_name_or_path=None)
        try:
            return _hashes(run), saved_code("log_decay")["my_scheme.py"]
        finally:
            del POSITION_EMBEDDINGS["log_decay"], sys.modules[module.__name__]

    first, code = hashes(example)
    module = import_scheme_file(example)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "my_scheme.py").write_bytes(code)
    assert import_scheme_file(tmp_path / "copy" / "my_scheme.py") is module  # whose name it would else find taken
    del POSITION_EMBEDDINGS["log_decay"], sys.modules[module.__name__]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "my_scheme.py").write_bytes(code)
    assert first == hashes(tmp_path / "run" / "my_scheme.py")[0] and list(first) == ["import_file/my_scheme.py"]
    example.write_text(EXAMPLE.replace("torch.log1p(", "2 * torch.log1p("), encoding="utf-8")
    assert hashes(example)[0] != first


def test_a_sweep_passes_the_file_to_its_workers(example, corpus_files, tmp_path):
    files = dict(zip(("train_file", "validation_file"), map(str, data_flags(corpus_files)[1::2])))
    train = {**files, "block_size": 16, "max_steps": 1, "eval_strategy": "no", "use_cpu": True, "bf16": False}
    train |= {"vocab_size": 300, "config_overrides": TINY, "per_device_train_batch_size": 2}
    experiment = {"import_file": "my_scheme.py", "train": train, "grid": {"pos_embedding_type": ["log_decay"]}}
    experiment["evaluate"] = {**files, "eval_lengths": [16], "max_windows": 2}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    flags = ["--experiment", "experiment.yaml", "--output_dir", "out"]
    done = hf_relpos("sweep", *flags, "--num_parallel", 2, cwd=tmp_path)
    assert "1 of 1 results" in done.stdout
    example.write_text(EXAMPLE + "\n# another one\n", encoding="utf-8")
    after = hf_relpos("sweep", *flags, "--dry_run", "true", cwd=tmp_path).stdout
    assert ": done" not in after, "the scheme has changed"


def test_a_file_may_be_named_in_a_configuration(example, tmp_path):
    (tmp_path / "run.yaml").write_text("import_file: my_scheme.py\n")
    assert "log_decay" in hf_relpos("schemes", "--config", "run.yaml", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "text", ["One line", "Two parts.\n\n    b = 0", "Parts.\n\n    b = 0\n\n    Paper: somebody 2026."]
)
def test_the_card_shows_what_the_docstring_has(text, tmp_path):
    import_scheme_file(write(tmp_path / "documented.py", "documented", text))
    make_model("documented").save_pretrained(tmp_path / "model")
    card = repository_files(tmp_path / "model", "someone/model")["README.md"].decode()
    assert text.partition("\n")[0].rstrip(".") in card and "None" not in card.partition("## ")[2]


BAD_FILES = {
    "missing": (None, "does not exist"),
    "registers nothing": ("x = 1\n", "registers no position embedding"),
    "an existing name": ("NAME alibi", "'alibi' is taken by AlibiBias: choose another"),
    "one that raises": ("raise KeyError('a\\nb')\n", "cannot be imported: KeyError:"),
    "no Python": ("def\n", "cannot be imported: SyntaxError:"),
}


@pytest.mark.parametrize("text, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(text, message, tmp_path, monkeypatch, capsys):
    from hf_relpos.cli import main

    path = tmp_path / "bad_file.py"
    if text and text.startswith("NAME"):
        write(path, text.split()[1])
    elif text:
        path.write_text(text)
    before = dict(POSITION_EMBEDDINGS)
    monkeypatch.setattr(sys, "argv", ["hf-relpos", "schemes", "--import_file", str(path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-relpos schemes: error: `import_file` ") and str(path) in line and message in line
    assert before == POSITION_EMBEDDINGS and "bad_file" not in sys.modules


@pytest.mark.parametrize("name", ["scheme_rotary", "json", "pytest", "my-scheme"])
def test_names_that_are_in_use_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="rename it"):
        import_scheme_file(write(tmp_path / f"{name}.py", "taken"))


def test_what_cannot_be_carried_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "local_helper.py").write_text("x = 1\n")
    (tmp_path / "registering.py").write_text("import hf_relpos\n")
    cases = {
        "one_helper": ("from local_helper import x", "it imports another local file, 'local_helper'"),
        "one_star": ("from hf_relpos.model.scheme_base import *", "must name what it imports"),
        "one_package": ("import hf_relpos", "must be `from hf_relpos import …`"),
    }
    for name, (top, reason) in cases.items():
        import_scheme_file(write(tmp_path / f"{name}.py", name, top=top))
        ((module, said),) = foreign_schemes(name).values()
        assert module == name and reason in said
        assert set(saved_code(name)) == {file.name for file in code_files()}
    use = "\n    ".join(("def embed(self, inputs_embeds, positions):", "    return RelPosConfig and inputs_embeds"))
    import_scheme_file(
        write(tmp_path / "one_circle.py", "one_circle", top="from hf_relpos import RelPosConfig", body=use)
    )
    assert "import it where it is used" in foreign_schemes("one_circle")["one_circle"][1]

    @register_position_embedding("one_local")
    class Local(PositionEmbedding):
        def distance_bias(self, distance):
            return -distance.float().expand(6, -1)

    assert "not at the top level" in foreign_schemes("one_local")["one_local"][1]


def test_the_text_stays_but_for_the_imports(tmp_path):
    top = "import math  # noqa\nfrom hf_relpos.model.scheme_base import (\n    Positions as P,  # é\n)\n"
    top += "import numpy; from hf_relpos import (Positions); y = 1"
    body = "\n    ".join(("def embed(self, inputs_embeds, positions):", "    from hf_relpos import RelPosConfig"))
    body += "\n        return inputs_embeds if (P, Positions, RelPosConfig) else None"
    import_scheme_file(write(tmp_path / "kept.py", "kept", "Text – é.", top, body))
    carried = saved_code("kept")["kept.py"].decode().splitlines()
    assert carried[0] == "from .scheme_base import PositionEmbedding, register_position_embedding"
    assert carried[1:3] == ["import math  # noqa", "from .scheme_base import Positions as P"]
    assert carried[3] == "import numpy; from .scheme_base import Positions; y = 1"
    assert '    """Text – é."""' in carried and "        from .configuration_relpos import RelPosConfig" in carried


def test_the_example_passes_all_checks(example):
    import_scheme_file(example)
    report = check_position_embedding("log_decay")
    assert report.passed, report
    assert "lacks `Past the training length: `, `Paper: `" in report.notes[0]


@pytest.mark.parametrize("top", ["from own_helper import x", "from .own_helper import x", "import own_folder.part"])
def test_a_file_that_imports_one_beside_it_is_refused_with_what_to_do(top, tmp_path):
    (tmp_path / "own_helper.py").write_text("x = 1\n")
    (tmp_path / "own_folder").mkdir()
    with pytest.raises(ValueError) as refused:
        import_scheme_file(write(tmp_path / "beside.py", "beside", top=top))
    name = "own_folder" if "folder" in top else "own_helper"
    said = f"it imports '{name}', which lies beside it and would not be saved with models: put both into one file"
    assert str(refused.value).endswith(f"cannot be imported: {said}") and "beside" not in POSITION_EMBEDDINGS


def test_what_a_script_defines_is_told_where_to_go(tmp_path, caplog):
    path = write(tmp_path / "own_script.py", "own_script", top="import hf_relpos")
    import_scheme_file(path)
    with caplog.at_level("WARNING", logger="transformers"):
        make_model("own_script").save_pretrained(tmp_path / "model")
    (note,) = [each for each in check_position_embedding("own_script", only=["start"]).notes if "saved" in each]
    assert note.startswith("'own_script' is not saved with models, since its file 'own_script.py' cannot be carried")
    (message,) = [record.message for record in caplog.records if "own_script" in record.message]
    assert (
        ":" not in message and "its file 'own_script.py' cannot be carried, as `import hf_relpos` in line 2" in message
    )
    assert "; put the class into a file of its own. " in message
