"""Finetuning as a user runs it: longer blocks, a longer learned table, sampled positions."""

import json

import pytest
import torch
from helpers import finetuning_flags, refusal, training_flags, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig


@pytest.mark.parametrize("scheme", ["none", "linear_cpb", "rotary"])
def test_finetuning_at_a_longer_length(trained, data_flags, tmp_path, run_script, scheme):
    flags = finetuning_flags(data_flags, trained / scheme, tmp_path / "long", block_size=96, max_steps=2)
    run_script("finetune", *flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert model.config.train_length == 96 and model.config.pos_embedding_type == scheme
    record = json.loads((tmp_path / "long" / "training.json").read_text())
    assert (record["train_length"], record["base_train_length"], record["base_model"]) == (96, 32, scheme)


def test_who_reads_the_rows_of_the_first_training_again_is_told(data_flags, tmp_path, run_script, capsys):
    """Rows of another length, another seed or a whole pass are no reason."""
    run_script("train", *training_flags(data_flags, tmp_path / "model", pos_embedding_type="alibi", max_steps=1))
    for name, options, is_told in (
        ("same", {"block_size": 32}, True),
        ("longer", {"block_size": 64}, False),
        ("other", {"block_size": 32, "data_seed": 7}, False),
        ("untrained", {"block_size": 32, "max_steps": 0}, False),
    ):
        flags = finetuning_flags(data_flags, tmp_path / "model", tmp_path / name, **{"max_steps": 1, **options})
        capsys.readouterr()
        run_script("finetune", *flags)
        assert ("note: these are the rows of the model's own training" in capsys.readouterr().out) == is_told, name
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    (tmp_path / "model" / "training.json").write_text(json.dumps(record | {"passes": 1.5}))
    run_script(
        "finetune", *finetuning_flags(data_flags, tmp_path / "model", tmp_path / "passed", max_steps=1, block_size=32)
    )
    assert "note: these are the rows" not in capsys.readouterr().out


def test_finetuning_a_learned_table(trained, data_flags, tmp_path, run_script, capsys):
    """Refused unless asked for; then the new rows repeat the old ones, and train."""
    flags = finetuning_flags(data_flags, trained / "learned", tmp_path / "long", block_size=80, max_steps=1)
    assert "`block_size` must be at most 32" in refusal(run_script, capsys, "finetune", flags)
    assert not (tmp_path / "long").exists()
    run_script("finetune", *flags, "--extend_learned_positions", "true", "--learning_rate", 0)
    name = "model.position_embeddings.learned.embedding.weight"
    old, new = weights(trained / "learned")[name], weights(tmp_path / "long")[name]
    assert torch.equal(new, torch.cat((old, old, old[:16])))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "long").config.max_position_embeddings == 80
    lengths = [
        AutoTokenizer.from_pretrained(folder).model_max_length for folder in (trained / "learned", tmp_path / "long")
    ]
    assert lengths == [32, 80]


def test_finetuning_with_sampled_positions(trained, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, trained / "rotary", tmp_path / "pose", max_steps=1, position_sampling="pose")
    run_script("finetune", *flags)
    assert json.loads((tmp_path / "pose" / "training.json").read_text())["position_sampling"] == "pose"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pose")
    assert model.config.position_sampling == "pose" and model.config.max_position_embeddings == 2048
    flags = finetuning_flags(data_flags, tmp_path / "pose", tmp_path / "x", position_start_augmentation="true")
    assert "`position_sampling` must be None" in refusal(run_script, capsys, "train", flags)
    flags = finetuning_flags(data_flags, tmp_path / "pose", tmp_path / "off", max_steps=1, position_sampling="none")
    run_script("finetune", *flags)
    assert json.loads((tmp_path / "off" / "training.json").read_text())["position_sampling"] is None


def test_finetuning_refuses_what_is_no_model(data_flags, tmp_path, run_script, capsys):
    (tmp_path / "empty").mkdir()
    flags = finetuning_flags(data_flags, tmp_path / "empty", tmp_path / "x")
    assert "holds no config.json" in refusal(run_script, capsys, "finetune", flags)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    flags = finetuning_flags(data_flags, tmp_path / "llama", tmp_path / "x")
    assert "holds no weights as safetensors" in refusal(run_script, capsys, "finetune", flags)
    assert "--model_name_or_path is required" in refusal(
        run_script, capsys, "finetune", finetuning_flags(data_flags, None, tmp_path / "x")
    )
