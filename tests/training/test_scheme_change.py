"""Another scheme for a saved model: which weights are copied, which are reinitialized, and what is recorded."""

import json
import math

import pytest
import torch
from conftest import make_model, make_tokens
from helpers import finetuning_flags, refusal, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_relpos.results.groups import VARIED
from hf_relpos.training.model_setup import new_model
from hf_relpos.training.scheme_change import ChangeArguments, changed_config, copy_weights, describe_changes


def change(model, block_size=32, **changes):
    """→ the changed model and what was copied."""
    config = changed_config(model.config, ChangeArguments(**changes), block_size)
    changed = new_model(config, seed=7).eval()
    return changed, copy_weights(model, changed)


# --- the model


@pytest.mark.parametrize(
    "scheme, other", [("rotary", "none"), ("none", "alibi"), ("alibi", "rotary"), ("rotary", "xpos")]
)
def test_a_scheme_without_weights_leaves_those_of_the_other(scheme, other):
    """The changed model is one made by hand: the other scheme with all weights of the first."""
    model, tokens = make_model(scheme), make_tokens(2, 19)
    changed, told = change(model, pos_embedding_type=other)
    by_hand = make_model(other)
    by_hand.load_state_dict(model.state_dict())
    assert torch.equal(changed(tokens).logits, by_hand(tokens).logits)
    assert not torch.equal(changed(tokens).logits, model(tokens).logits)
    assert told["reinitialized"] == told["dropped"] == {}
    assert told["copied"].startswith(f"{len(model.state_dict())} tensors")
    assert changed.config.train_length == 8, "nothing was trained yet"
    assert hasattr(changed.config, "rope_parameters") == (other in ("rotary", "xpos"))


def test_weights_of_the_scheme_are_reinitialized_and_dropped():
    model = make_model("linear_cpb+learned")
    changed, told = change(model, pos_embedding_type="log_cpb+learned")
    fresh = new_model(changed.config, seed=7).state_dict()
    for name, weight in changed.state_dict().items():
        assert torch.equal(weight, fresh[name] if "log_cpb" in name else model.state_dict()[name]), name
    assert all("log_cpb" in name and why == "the saved model has none" for name, why in told["reinitialized"].items())
    assert all("linear_cpb" in name and why == "the new scheme has none" for name, why in told["dropped"].items())
    assert len(told["reinitialized"]) == len(told["dropped"]) == 6  # in each of two layers two weights and a bias


def test_options_stay_with_their_scheme_and_other_shapes_are_reinitialized():
    model = make_model("linear_cpb", pos_embedding_kwargs={"mlp_width": 8})
    assert change(model, pos_embedding_type="rotary+linear_cpb")[0].config.pos_embedding_kwargs == {"mlp_width": 8}
    assert change(model, pos_embedding_type="alibi")[0].config.pos_embedding_kwargs == {}
    changed, told = change(model, pos_embedding_kwargs='{"mlp_width": 16}')
    assert changed.config.pos_embedding_kwargs == {"mlp_width": 16}
    assert "the saved model has it in shape (8, 1)" in told["reinitialized"].values()


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}], ids=str
)
def test_another_rotation_is_llamas(rope):
    """The frequencies of transformers' Llama at the training length as the original one; base and channels stay."""
    model = make_model("rotary", head_dim=16, train_length=64, rope_parameters={"rope_theta": 500.0})
    changed, _ = change(model, rope_parameters=json.dumps(rope))
    rope = {"rope_theta": 500.0, **rope}
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = 64
    assert changed.config.rope_parameters == {"partial_rotary_factor": 1.0, **rope}
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, max_position_embeddings=160, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    ours = changed.model.position_embeddings["rotary"]
    assert_close(ours.inv_freq(torch.arange(3)[None]), theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)
    if rope["rope_type"] == "linear":  # position interpolation, by its definition
        assert_close(ours.inv_freq(torch.arange(3)[None]), torch.tensor([500.0 ** (-k / 8) / 4 for k in range(8)]))
    else:
        assert ours.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_windows_can_be_laid_over_and_taken_away():
    model, tokens = make_model("rotary"), make_tokens(1, 30)
    windowed, _ = change(model, pos_embedding_type="rotary/none", layer_types="sliding/full", sliding_window=6)
    by_hand = make_model("rotary/none", layer_types=["sliding_attention", "full_attention"], sliding_window=6)
    by_hand.load_state_dict(model.state_dict())
    assert torch.equal(windowed(tokens).logits, by_hand(tokens).logits)
    back, _ = change(windowed, pos_embedding_type="rotary", layer_types="full")
    assert back.config.sliding_window is None and not hasattr(back.config, "layer_types")
    assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_lengths_of_tables_and_ranges():
    model = make_model("none", max_position_embeddings=2048)
    assert change(model, pos_embedding_type="learned", block_size=48)[0].config.max_position_embeddings == 48
    assert change(model, max_position_embeddings=500)[0].config.max_position_embeddings == 500
    dynamic = '{"rope_type": "dynamic", "factor": 2.0}'
    assert change(make_model("rotary"), rope_parameters=dynamic, block_size=8)[0].config.max_position_embeddings == 8


BAD = {
    "rotation without rotary": ("none", dict(rope_parameters='{"factor": 2}'), "`rope_parameters` is for"),
    "rotation that goes": (
        "rotary",
        dict(rope_parameters='{"factor": 2}', pos_embedding_type="none"),
        "`rope_parameters` is for .* got it with 'none'",
    ),
    "no JSON": ("rotary", dict(rope_parameters="yarn"), "`rope_parameters` must be JSON: 'yarn' cannot be read"),
    "no dictionary": ("rotary", dict(rope_parameters="[1]"), "`rope_parameters` must be a dictionary"),
    "rotation without its factor": ("rotary", dict(rope_parameters='{"rope_type": "yarn"}'), r"must have \['factor'\]"),
    "unknown rotation": ("rotary", dict(rope_parameters='{"rope_type": "ntk"}'), "'rope_type' must be one of"),
    "dynamic rotation past its length": (
        "rotary",
        dict(rope_parameters='{"rope_type": "dynamic", "factor": 2}'),
        "`block_size` must be at most .* rope_type 'dynamic', 8, got 32",
    ),
    "rows of a table": ("learned", dict(max_position_embeddings=99), "--extend_learned_positions true"),
    "layers without a window": ("alibi", dict(layer_types="sliding/full"), "`sliding_window` must be given"),
    "unknown scheme": ("alibi", dict(pos_embedding_type="alibii"), "`pos_embedding_type` names no scheme: 'alibii'"),
    "unknown option": ("alibi", dict(pos_embedding_kwargs='{"width": 3}'), "`pos_embedding_kwargs` of 'alibi' may"),
}


@pytest.mark.parametrize("scheme, changes, message", BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused(scheme, changes, message):
    with pytest.raises(ValueError, match=message):
        change(make_model(scheme), **changes)


# --- the script


def test_drope_and_temperature(trained, data_flags, tmp_path, run_script, capsys):
    """Rotary is dropped and the model trained at its old length; then only its configuration changes."""
    flags = finetuning_flags(data_flags, trained / "rotary", tmp_path / "drope", pos_embedding_type="none", max_steps=2)
    run_script("finetune", *flags)
    assert "pos_embedding_type: 'rotary' -> 'none'" in capsys.readouterr().out
    record = json.loads((tmp_path / "drope" / "training.json").read_text())
    assert record["changes"]["fields"]["pos_embedding_type"] == ["rotary", "none"]
    assert (record["pos_embedding_type"], record["train_length"], record["base_train_length"]) == ("none", 32, 32)
    assert VARIED["changes"](record["changes"]) == "from rotary" and VARIED["changes"](None) == ""
    flags = finetuning_flags(
        data_flags, tmp_path / "drope", tmp_path / "sharp", pos_embedding_type="temperature", max_steps=0, block_size=64
    )
    run_script("finetune", *flags)
    record = json.loads((tmp_path / "sharp" / "training.json").read_text())
    assert (record["num_steps"], record["num_tokens"], record["train_length"]) == (0, 0, 32)
    assert record["train_loss"] is None and record["validation_loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharp")
    assert (model.config.pos_embedding_type, model.config.train_length) == ("temperature", 32)
    before, after = weights(tmp_path / "drope"), weights(tmp_path / "sharp")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_dropped_table_is_told(trained, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, trained / "learned", tmp_path / "x", pos_embedding_type="alibi", max_steps=0)
    run_script("finetune", *flags)
    name = "model.position_embeddings.learned.embedding.weight"
    assert f"dropped: {name} (the new scheme has none)" in capsys.readouterr().out
    changes = json.loads((tmp_path / "x" / "training.json").read_text())["changes"]
    assert list(changes["dropped"]) == [name]
    assert describe_changes(changes).splitlines()[-1].startswith("dropped: ")
    before, after = weights(trained / "learned"), weights(tmp_path / "x")
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_yarn_and_pose_by_the_script(trained, data_flags, tmp_path, run_script, capsys):
    yarn = dict(rope_parameters='{"rope_type": "yarn", "factor": 2.0}', block_size=64, max_steps=1)
    run_script("finetune", *finetuning_flags(data_flags, trained / "rotary", tmp_path / "yarn", **yarn))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "yarn").config
    assert config.rope_parameters["original_max_position_embeddings"] == 32 and config.train_length == 64
    pose = dict(position_sampling="pose", max_position_embeddings=100, max_steps=1)
    run_script("finetune", *finetuning_flags(data_flags, trained / "rotary", tmp_path / "pose", **pose))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "pose").config
    assert (config.position_sampling, config.max_position_embeddings) == ("pose", 100)
    flags = finetuning_flags(data_flags, trained / "none", tmp_path / "x", pos_embedding_type="alibi")
    assert "`pos_embedding_type` of the checkpoint" in refusal(run_script, capsys, "train", flags)
