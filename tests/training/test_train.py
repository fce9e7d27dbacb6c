"""Training as a user runs it: what it saves, what it resumes, and what bad input gets."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import SCHEMES, make_config
from helpers import finetuning_flags, refusal, run_in_shell, same_weights, training_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_relpos import RelPosForCausalLM
from hf_relpos.tasks.arguments import DataArguments
from hf_relpos.training.arguments import RelPosTrainingArguments
from hf_relpos.training.checkpoints import find_checkpoint
from hf_relpos.training.model_setup import ModelArguments, new_model
from hf_relpos.training.train import train


def test_training_saves_a_model_its_tokenizer_and_a_record(trained):
    folder = trained / "linear_cpb"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is RelPosForCausalLM and len(tokenizer) == model.config.vocab_size == 300
    assert model.config.train_length == 32 and model.config.use_cache
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert model.config.pad_token_id == tokenizer.pad_token_id
    record = json.loads((folder / "training.json").read_text())
    assert (record["num_steps"], record["num_tokens"], record["seed"]) == (6, 6 * 4 * 32, 42)
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert record["validation_loss"] > 0 and record["tokens_per_second"] > 0
    assert (
        record["corpus"]["name"] == "train+valid.txt"
        and record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )


def test_all_validation_blocks_are_evaluated_whatever_the_batch(data_flags, trained, tmp_path, run_script):
    losses = []
    for size in (1, 7, 5000):  # of which the last is more than there are
        flags = finetuning_flags(data_flags, trained / "none", tmp_path / str(size), max_steps=0)
        run_script("finetune", *flags, "--per_device_eval_batch_size", size)
        losses.append(json.loads((tmp_path / str(size) / "training.json").read_text())["validation_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
def test_what_all_schemes_have_starts_the_same(scheme):
    plain, model = (new_model(make_config(name), seed=3).state_dict() for name in ("none", scheme))
    assert all(torch.equal(model[name], plain[name]) for name in plain)
    assert not torch.equal(
        new_model(make_config(scheme), seed=4).state_dict()["lm_head.weight"], plain["lm_head.weight"]
    )


def test_learned_tables_hold_what_is_trained(trained):
    assert AutoModelForCausalLM.from_pretrained(trained / "learned").config.max_position_embeddings == 32
    assert AutoModelForCausalLM.from_pretrained(trained / "none").config.max_position_embeddings == 2048


def test_data_come_in_one_order_for_every_scheme_and_seed(data_flags, tmp_path, monkeypatch, run_script):
    """What the model sees, step by step; another --data_seed gives another order."""
    seen: list[list] = []
    forward = RelPosForCausalLM.forward

    def recording(self, input_ids=None, **kwargs):
        if self.training:
            seen[-1].append(input_ids.clone())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(RelPosForCausalLM, "forward", recording)
    runs = [("alibi", 42, 42), ("alibi", 7, 42), ("learned", 365, 42), ("alibi", 42, 7)]
    for index, (scheme, seed, data_seed) in enumerate(runs):
        seen.append([])
        overrides = dict(pos_embedding_type=scheme, seed=seed, data_seed=data_seed, max_steps=3, eval_strategy="no")
        # RelPosForCausalLM.forward decides which columns the Trainer keeps
        overrides["remove_unused_columns"] = "false"
        run_script("train", *training_flags(data_flags, tmp_path / str(index), **overrides))
    batches = [torch.stack(run) for run in seen]
    assert batches[0].shape == (3, 4, 32)
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[3])
    assert not same_weights(tmp_path / "0", tmp_path / "1"), "another seed is another model"


def test_resuming_is_the_same_as_not_stopping(data_flags, tmp_path, run_script):
    """Also in the data order, the augmentation's and dropout's random numbers, and the schedule."""
    overrides = dict(pos_embedding_type="learned", position_start_augmentation="true", max_position_embeddings=64)
    overrides |= dict(lr_scheduler_type="cosine", save_total_limit=5)
    run_script("train", *training_flags(data_flags, tmp_path / "whole", **overrides))
    (tmp_path / "parts").mkdir()
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    (tmp_path / "parts" / "checkpoint-5").mkdir()  # killed while it was written
    resumed = training_flags(data_flags, tmp_path / "parts", **overrides, resume_from_checkpoint="last")
    run_script("train", *resumed)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    record = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert (record["resumed_from_step"], record["num_steps"]) == (3, 6)


def test_processes_that_do_not_take_part_are_refused(tmp_path, monkeypatch):
    """As when torchrun starts two on a machine without GPUs and --use_cpu is missing: two runs, one folder."""
    args = RelPosTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but 1 take part"):
        train(ModelArguments(), DataArguments(), args)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_trackers(data_flags, tmp_path, tracker):
    pytest.importorskip(tracker)
    # both folders are read from the environment when the tracker is imported
    folders = {"TENSORBOARD_LOGGING_DIR": tmp_path / "tensorboard", "TRACKIO_DIR": tmp_path / "trackio"}
    flags = training_flags(data_flags, tmp_path / "run", max_steps=2, report_to=tracker, project="relpos-test")
    process = run_in_shell("train", flags, env=os.environ | {name: str(path) for name, path in folders.items()})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert any(path.is_file() and path.stat().st_size for path in (tmp_path / tracker).rglob("*"))


def test_a_tracker_that_is_not_installed(data_flags, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    flags = training_flags(data_flags, tmp_path / "run", report_to="tensorboard")
    assert "`report_to` ['tensorboard'] cannot be used" in refusal(run_script, capsys, "train", flags)


def test_streaming(data_flags, tmp_path, run_script):
    run_script("train", *training_flags(data_flags, tmp_path / "run", streaming="true"))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["num_steps"] == 6


def test_configuration_file_with_flags_on_top(data_flags, tmp_path, run_script):
    flags = training_flags(data_flags, tmp_path / "run", learning_rate=None, max_steps=None, pos_embedding_kwargs=None)
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-3\nmax_steps: 50\npos_embedding_type: log_cpb\npos_embedding_kwargs: {mlp_width: 8}\n"
        "report_to: [none]\nbf16: false\n"
    )
    run_script("train", "--config", tmp_path / "run.yaml", *flags, "--max_steps", 2)
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["num_steps"], record["recipe"]["learning_rate"]) == (2, 1e-3)
    assert (record["pos_embedding_type"], record["pos_embedding_kwargs"]) == ("log_cpb", {"mlp_width": 8})


def test_going_on_with_a_saved_model_at_the_same_length(trained, data_flags, tmp_path, run_script):
    run_script("train", *finetuning_flags(data_flags, trained / "rotary", tmp_path / "on"))
    record = json.loads((tmp_path / "on" / "training.json").read_text())
    assert (record["base_model"], record["pos_embedding_type"]) == ("rotary", "rotary")


BAD_TRAINING = {
    "unknown scheme": (dict(pos_embedding_type="alibii"), "`pos_embedding_type` names no scheme: 'alibii'"),
    "unknown option": (dict(pos_embedding_kwargs='{"width": 1}'), "`pos_embedding_kwargs` of 'linear_cpb' may hold"),
    "options that are no JSON": (dict(pos_embedding_kwargs="{width}"), "`pos_embedding_kwargs` must be JSON"),
    "a rotation that is no dictionary": (dict(rope_parameters="[1]"), "`rope_parameters` must be a dictionary"),
    "unknown size": (dict(model_size="tiny"), "`model_size` must be one of"),
    "unknown field": (dict(config_overrides="hidden=3"), "`config_overrides` must be"),
    "field of the tokenizer": (dict(config_overrides="vocab_size=555"), "`config_overrides` must be 'field=value,..'"),
    "no step": (dict(max_steps=0), "`max_steps` must be at least 1, got 0"),
    "a best model by what is not measured": (
        dict(load_best_model_at_end="true", metric_for_best_model="accuracy"),
        "`metric_for_best_model` must be loss or eval_loss, got 'accuracy'",
    ),
    "no block": (dict(per_device_train_batch_size=0), "`per_device_train_batch_size` must be at least 1, got 0"),
    "no accumulation": (dict(gradient_accumulation_steps=0), "`gradient_accumulation_steps` must be at least 1, got 0"),
    "no evaluation": (dict(max_eval_samples=0), "`max_eval_samples` must be at least 1, got 0"),
    "too short a stream": (
        dict(streaming="true", block_size=100_000),
        "`block_size` 100000 is more than the train split",
    ),
    "heads": (dict(config_overrides="hidden_size=32,num_attention_heads=3"), "`num_attention_heads` must divide"),
    "unknown flag": (dict(no_such_flag=1), "unknown flag: '--no_such_flag'"),
    "no number": (dict(block_size="long"), "invalid int value: 'long'"),
    "length of 0": (dict(block_size=0, per_device_train_batch_size=4), "`block_size` must be at least 2, got 0"),
    "missing file": (dict(train_file="no/such.txt"), "`train_file` 'no/such.txt' does not exist"),
    "missing configuration": (dict(config="no.yaml"), "--config 'no.yaml' does not exist"),
    "too short a corpus": (dict(block_size=100_000), "`block_size` 100000 is more than the train split holds"),
    "too large a batch": (dict(per_device_train_batch_size=10_000), "a step needs 10000 blocks"),
    "vocabulary of another size": (dict(vocab_size=5000), "`vocab_size` 5000 is more than this corpus gives"),
    "tokenizer of another size": (dict(tokenizer_name="MODEL", vocab_size=400), "but the tokenizer has 300 entries"),
    "no model": (
        dict(model_name_or_path="no/such/folder", vocab_size=None, config_overrides=None),
        "'no/such/folder': there is no such folder",
    ),
    "two models": (dict(model_name_or_path="MODEL"), "`vocab_size` is that of the saved model"),
    "no checkpoint": (dict(resume_from_checkpoint="last"), "holds no checkpoint"),
    "augmentation without room": (
        dict(position_start_augmentation="true", max_position_embeddings=16, pos_embedding_type="learned"),
        "`block_size` must be at most 16",
    ),
}


@pytest.mark.parametrize("overrides, message", BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_training_refuses(overrides, message, trained, data_flags, tmp_path, run_script, capsys):
    overrides = {name: trained / "linear_cpb" if value == "MODEL" else value for name, value in overrides.items()}
    assert message in refusal(run_script, capsys, "train", training_flags(data_flags, tmp_path / "x", **overrides))
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_a_run_is_refused(trained, data_flags, run_script, capsys):
    before = sorted(path.name for path in (trained / "none").iterdir())
    assert "already holds a run" in refusal(run_script, capsys, "train", training_flags(data_flags, trained / "none"))
    assert sorted(path.name for path in (trained / "none").iterdir()) == before


def test_a_folder_with_other_files_is_said(tmp_path, capsys):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, process_index=0)
    (tmp_path / "log.txt").touch()
    assert find_checkpoint(args) is None and not capsys.readouterr().out
    (tmp_path / "novel.txt").touch()
    assert find_checkpoint(args) is None
    assert "holds other files ('novel.txt'); the model is saved among them" in capsys.readouterr().out


def test_resuming_with_another_scheme_is_refused(trained, data_flags, tmp_path, run_script, capsys):
    flags = training_flags(data_flags, trained / "none", resume_from_checkpoint="last", pos_embedding_type="alibi")
    assert "`pos_embedding_type` of the checkpoint" in refusal(run_script, capsys, "train", flags)
    flags = finetuning_flags(data_flags, trained / "none", tmp_path / "x", pos_embedding_type="alibi")
    assert "`pos_embedding_type` of the checkpoint" in refusal(run_script, capsys, "train", flags)
