"""The life of a run: what a resumption compares, which checkpoint it takes, and when training stops."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import finetuning_flags, refusal, same_weights, training_flags
from safetensors.torch import load_file, save_file

from hf_relpos.results.training_record import given_flags
from hf_relpos.training.arguments import RelPosTrainingArguments
from hf_relpos.training.checkpoints import damage
from hf_relpos.training.model_setup import ModelArguments
from hf_relpos.training.recipe import differences
from hf_relpos.training.trainer import RelPosTrainer


@pytest.fixture(scope="module")
def finished(trained):
    return trained / "linear_cpb"


@pytest.fixture
def copy(finished, tmp_path):
    """→ a finished run of 6 steps, with checkpoints of 3 and 6."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def stopped(copy):
    """→ the same before the model was saved."""
    for path in (*copy.glob("*.json"), *copy.glob("*.safetensors")):
        path.unlink()
    return copy


def resume_flags(data_flags, folder, **overrides):
    flags = dict(pos_embedding_type="linear_cpb", resume_from_checkpoint="last")
    return training_flags(data_flags, folder, **{**flags, **overrides})


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_of(folder):
    return json.loads((folder / "training.json").read_text())


def test_a_finished_run_is_left_alone(data_flags, copy, run_script, capsys):
    before = contents(copy)
    run_script("train", *resume_flags(data_flags, copy))
    assert contents(copy) == before
    assert "nothing to do" in capsys.readouterr().out
    for part in copy.glob("checkpoint-*"):
        shutil.rmtree(part)
    before = contents(copy)
    run_script("train", *resume_flags(data_flags, copy))
    assert contents(copy) == before


def test_a_run_killed_after_its_last_step_is_only_evaluated_and_saved(data_flags, finished, stopped, run_script):
    run_script("train", *resume_flags(data_flags, stopped))
    assert same_weights(finished, stopped)
    ours, theirs = record_of(stopped), record_of(finished)
    for name in ("num_steps", "num_tokens", "log", "validation_loss"):
        assert ours[name] == theirs[name]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4) and ours["resumed_from_step"] == 6


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_finished_run_that_is_damaged_is_saved_again(name, data_flags, finished, copy, run_script, capsys):
    (copy / name).write_bytes(b"")
    run_script("train", *resume_flags(data_flags, copy))
    assert f"damaged: {copy}: " in (printed := capsys.readouterr().out) and name in printed
    assert same_weights(finished, copy) and record_of(copy)["num_steps"] == 6
    for part in copy.glob("checkpoint-*"):
        shutil.rmtree(part)
    (copy / name).write_bytes(b"")
    line = refusal(run_script, capsys, "train", resume_flags(data_flags, copy))
    assert "holds a finished run, and it is damaged" in line and name in line


OTHER_RECIPES = {
    "learning rate": (dict(learning_rate="5e-4"), "`learning_rate` is 0.001, got 0.0005"),
    "seed": (dict(seed=7), "`seed` is 42, got 7"),
    "batch": (dict(per_device_train_batch_size=2), "`per_device_train_batch_size` is 4, got 2"),
    "accumulation": (dict(gradient_accumulation_steps=2), "`gradient_accumulation_steps` is 1, got 2"),
    "schedule": (dict(lr_scheduler_type="cosine"), "`lr_scheduler_type` is 'constant', got 'cosine'"),
    "steps": (dict(max_steps=9), "`max_steps` is 6, got 9"),
    "order of the data": (dict(data_seed=7), "`data_seed` is 42, got 7"),
    "dtype": (dict(bf16="true"), "`bf16` is False, got True"),
    "documents": (dict(cross_document_attention="true"), "`cross_document_attention` is False, got True"),
    "optimizer": (dict(adam_beta2=0.95), "`adam_beta2` is 0.999, got 0.95"),
}


@pytest.mark.parametrize("overrides, message", OTHER_RECIPES.values(), ids=OTHER_RECIPES)
def test_another_recipe_is_refused(overrides, message, data_flags, copy, run_script, capsys):
    before = contents(copy)
    assert message in refusal(run_script, capsys, "train", resume_flags(data_flags, copy, **overrides))
    assert contents(copy) == before


def test_another_corpus_is_refused(corpus_files, tmp_path, copy, run_script, capsys):
    train = shutil.copytree(corpus_files / "train", tmp_path / "train")
    (train / "03.txt").write_text((train / "03.txt").read_text()[:-5] + "peace", encoding="utf-8")
    data_flags = ["--train_file", train, "--validation_file", corpus_files / "valid.txt"]
    line = refusal(run_script, capsys, "train", resume_flags(data_flags, copy))
    assert "`corpus_fingerprint` is" in line


def other_weights(base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, path, {"format": "pt"})
    return "base_model/model.safetensors"


def other_dropout(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    return "attention_dropout"  # which the model that is trained has too


def other_imports(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name": "another"}))
    return "base_model/config.json"


def other_tokenizer(base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}  # which gives this text the same tokens
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    return "tokenizer/tokenizer.json"


def written_again(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99.0"}, indent=7))


@pytest.mark.parametrize("change", [other_weights, other_dropout, other_imports, other_tokenizer])
@pytest.mark.parametrize("override", ["false", "true"])
def test_another_base_model_of_the_same_name_is_refused(
    change, override, data_flags, trained, tmp_path, run_script, capsys
):
    base, run = shutil.copytree(trained / "rotary", tmp_path / "base"), tmp_path / "run"
    run_script("finetune", *finetuning_flags(data_flags, base, run, max_steps=3))
    moved = shutil.copytree(base, tmp_path / "elsewhere" / "base")
    written_again(moved)
    flags = dict(max_steps=3, resume_from_checkpoint="last", override_recipe=override)
    run_script("finetune", *finetuning_flags(data_flags, moved, run, **flags))
    assert "nothing to do" in capsys.readouterr().out, "it is the same model"
    (run / "training.json").unlink()
    name, before = change(moved), contents(run)
    line = refusal(run_script, capsys, "finetune", finetuning_flags(data_flags, moved, run, **flags))
    assert f"`{name}` " in line and "got " in line and contents(run) == before


def test_what_an_earlier_version_did_not_note_is_not_compared(finished):
    values = json.loads((finished / "checkpoint-6" / "recipe.json").read_text())["values"]
    run = SimpleNamespace(args=RelPosTrainingArguments(output_dir="x"))
    assert not differences({}, {"base_model/config.json": "0"}, run)
    assert differences({"base_model/a.safetensors": "0"}, {}, run) == {"base_model/a.safetensors": ["0", None]}
    assert "tokenizer/tokenizer.json" in values and not any(name.startswith("base_model/") for name in values)


def test_an_overridden_recipe_runs_and_is_recorded(data_flags, copy, run_script, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args, **kwargs: rates.append(self.param_groups[0]["lr"]) or step(self, *args, **kwargs),
    )
    flags = resume_flags(data_flags, copy, max_steps=9, learning_rate="5e-4", override_recipe="true")
    run_script("train", *flags)
    assert rates == [5e-4] * 3
    record = record_of(copy)
    assert (record["num_steps"], record["recipe"]["learning_rate"]) == (9, 5e-4)
    changed = {"learning_rate": [1e-3, 5e-4], "max_steps": [6, 9]}
    assert record["resume"]["overrides"] == [{"step": 6, "values": changed}]
    before = contents(copy)
    run_script("train", *flags)
    assert contents(copy) == before, "now this is the recipe of a finished run"


DAMAGE = {
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "half the weights": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "no weights": ("model.safetensors", lambda path: path.unlink()),
    "half a state": ("trainer_state.json", lambda path: path.write_text(path.read_text()[:50])),
    "a state that is a list": ("trainer_state.json", lambda path: path.write_text("[]")),
    "no configuration": ("config.json", lambda path: path.unlink()),
    "no optimizer": ("optimizer.pt", lambda path: path.unlink()),
    "empty optimizer": ("optimizer.pt", lambda path: path.write_bytes(b"")),
    "half an optimizer": ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:2000])),
    "no schedule": ("scheduler.pt", lambda path: path.unlink()),
    "no random numbers": ("rng_state.pth", lambda path: path.unlink()),
    "half a recipe": ("recipe.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize("name, harm", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found(name, harm, finished, tmp_path):
    checkpoint = shutil.copytree(finished / "checkpoint-6", tmp_path / "checkpoint-6")
    assert damage(checkpoint) is None
    harm(checkpoint / name)
    assert name in damage(checkpoint)


def other_shapes(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor[:1].clone() for name, tensor in tensors.items()}, checkpoint / "model.safetensors")


UNFIT = {
    "weights": (other_shapes, "its weights are not those of this model"),
    "schedule": (lambda path: torch.save({"x": 1}, path / "scheduler.pt"), "its optimizer is not that of this model"),
    "random numbers": (lambda path: torch.save([1], path / "rng_state.pth"), "its random numbers cannot be read"),
}


@pytest.mark.parametrize("harm, message", UNFIT.values(), ids=UNFIT)
def test_parts_that_are_whole_but_of_something_else(harm, message, data_flags, stopped, run_script, capsys):
    shutil.rmtree(stopped / "checkpoint-6")
    harm(stopped / "checkpoint-3")
    assert message in refusal(run_script, capsys, "train", resume_flags(data_flags, stopped))


def test_weights_of_another_model_at_the_end(data_flags, stopped, run_script, capsys):
    other_shapes(stopped / "checkpoint-6")
    line = refusal(run_script, capsys, "train", resume_flags(data_flags, stopped))
    assert "checkpoint-6' holds the weights of another model" in line


def test_a_damaged_record_does_not_hold_up_a_run(data_flags, finished, copy, run_script, capsys):
    (copy / "training.json").write_text("{")
    run_script("train", *resume_flags(data_flags, copy))
    assert "damaged: training record" in capsys.readouterr().out
    assert same_weights(finished, copy) and record_of(copy)["num_steps"] == 6


def test_the_newest_whole_checkpoint_is_used(data_flags, finished, stopped, run_script, capsys):
    (stopped / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    run_script("train", *resume_flags(data_flags, stopped))
    output = capsys.readouterr().out
    assert "checkpoint-6: optimizer.pt cannot be read; resuming from" in output
    assert same_weights(finished, stopped) and record_of(stopped)["resumed_from_step"] == 3
    named = resume_flags(data_flags, stopped, resume_from_checkpoint=stopped / "checkpoint-3")
    (stopped / "checkpoint-3" / "rng_state.pth").unlink()
    assert "is damaged: rng_state.pth is missing" in refusal(run_script, capsys, "train", named)


def test_the_checkpoint_may_be_rotated_away_before_the_end(data_flags, finished, stopped, run_script):
    shutil.rmtree(stopped / "checkpoint-6")
    run_script("train", *resume_flags(data_flags, stopped, save_total_limit=1))
    assert same_weights(finished, stopped) and record_of(stopped)["resumed_from_step"] == 3
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-6"]


def test_no_whole_checkpoint_is_no_new_start(data_flags, stopped, run_script, capsys):
    for part in stopped.glob("checkpoint-*"):
        (part / "scheduler.pt").unlink()
    assert "holds no whole checkpoint" in refusal(run_script, capsys, "train", resume_flags(data_flags, stopped))


def test_a_checkpoint_may_have_another_name(data_flags, finished, stopped, run_script):
    (stopped / "checkpoint-3").rename(stopped / "checkpoint-copy")
    shutil.rmtree(stopped / "checkpoint-6")
    run_script("train", *resume_flags(data_flags, stopped))
    assert same_weights(finished, stopped) and record_of(stopped)["resumed_from_step"] == 3


def test_weights_that_are_not_finite_are_no_checkpoint(finished, tmp_path):
    checkpoint = shutil.copytree(finished / "checkpoint-6", tmp_path / "checkpoint-6")
    state = load_file(checkpoint / "model.safetensors")
    next(iter(state.values()))[0] = float("nan")
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in damage(checkpoint)


def each_moment(change):
    return lambda state: {
        **state,
        "state": {key: {name: change(value) for name, value in each.items()} for key, each in state["state"].items()},
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {**state, "state": {}}, "it is empty"),
        (each_moment(lambda value: value[:1] if value.dim() else value), "has shape"),
        (each_moment(lambda value: value * float("nan")), "is not finite"),
        (lambda state: {"state": {}, "param_groups": []}, "different number of parameter groups"),
        (lambda state: [1, 2], "TypeError"),
    ],
)
def test_an_optimizer_of_another_model_is_refused(change, message, data_flags, stopped, run_script, capsys):
    path = stopped / "checkpoint-3" / "optimizer.pt"
    shutil.rmtree(stopped / "checkpoint-6")
    torch.save(change(torch.load(path)), path)
    line = refusal(run_script, capsys, "train", resume_flags(data_flags, stopped))
    assert "checkpoint-3': its optimizer is not that of this model: " in line and message in line


def test_the_first_loss_that_is_not_finite_stops_the_run(data_flags, tmp_path, run_script, capsys, monkeypatch):
    compute_loss = RelPosTrainer.compute_loss

    def diverging(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(RelPosTrainer, "compute_loss", diverging)
    flags = training_flags(data_flags, tmp_path / "run", save_steps=1, save_total_limit=1)
    line = refusal(run_script, capsys, "train", flags)
    assert "the loss of step 5 is nan; the last finite checkpoint is" in line and "checkpoint-4" in line
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / "run" / "training.json").exists()


def test_a_learning_rate_that_destroys_the_model(data_flags, tmp_path, run_script, capsys):
    flags = training_flags(data_flags, tmp_path / "run", learning_rate="1e30", save_steps=1)
    assert "training stopped" in refusal(run_script, capsys, "train", flags)
    assert all(damage(part) is None for part in (tmp_path / "run").glob("checkpoint-*"))


def test_the_record_is_that_of_the_best_checkpoint(data_flags, tmp_path, run_script, monkeypatch):
    evaluate = RelPosTrainer.evaluation_loop

    def worse_and_worse(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] += self.state.global_step
        return output

    monkeypatch.setattr(RelPosTrainer, "evaluation_loop", worse_and_worse)
    overrides = dict(load_best_model_at_end="true", eval_steps=2, save_steps=2, save_total_limit=1)
    run_script("train", *training_flags(data_flags, tmp_path / "run", **overrides))
    record = record_of(tmp_path / "run")
    assert (record["num_steps"], record["num_tokens"], record["num_steps_trained"]) == (2, 2 * 4 * 32, 6)
    evaluated = [entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry]
    assert evaluated == [record["validation_loss"]] and max(entry["step"] for entry in record["log"]) == 2
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert record["train_loss"] == pytest.approx(sum(losses) / 2)
    assert same_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-2")


def test_long_flags_are_recorded():
    text = '{"partial_rotary_factor": ' + "0" * 5000 + "}"
    assert given_flags(ModelArguments(rope_parameters=text)) == {"rope_parameters": text}
    assert given_flags(ModelArguments(rope_parameters="\0")) == {"rope_parameters": "\0"}


def test_no_room_for_a_checkpoint(data_flags, tmp_path, run_script, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("hf_relpos.environment.shutil.disk_usage", lambda path: usage)
    assert "has room for 0.0 MiB" in refusal(run_script, capsys, "train", training_flags(data_flags, tmp_path / "run"))


def test_an_output_folder_that_cannot_be_made(data_flags, tmp_path, run_script, capsys):
    (tmp_path / "file").write_text("")
    flags = training_flags(data_flags, tmp_path / "file" / "run")
    assert "file" in refusal(run_script, capsys, "train", flags)
