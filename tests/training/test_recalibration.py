"""Recalibration of a saved model: fp32 weights beside bf16, LoRA, schemes by layer, lengths that stay."""

import json
import math
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer, make_tokens
from helpers import finetuning_flags, refusal, run_without_the_package, same_weights, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_relpos import RelPosConfig, RelPosForCausalLM
from hf_relpos.training import lora
from hf_relpos.training.arguments import FinetuningArguments
from hf_relpos.training.checkpoints import damage
from hf_relpos.training.scheme_change import ChangeArguments, changed_config, with_weights
from hf_relpos.training.scheme_schedule import SchemeSchedule


def save(folder, scheme="rotary", dtype=torch.float32, **fields):
    """→ the folder of a model whose vocabulary is that of the tests' tokenizer."""
    tokenizer = make_tokenizer()
    fields = dict(vocab_size=len(tokenizer), num_hidden_layers=4, train_length=64, eos_token_id=1) | fields
    make_model(scheme, **fields).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    return save(tmp_path_factory.mktemp("rotary") / "rotary")


def tensors(folder):
    return load_file(folder / "model.safetensors")


def resumes_to_the_bit(run_script, flags, whole, tmp_path):
    """Takes the run up again from its checkpoint of step 3, in another folder."""
    shutil.copytree(whole / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    flags = [tmp_path / "again" if flag == whole else flag for flag in flags]
    run_script("finetune", *flags, "--resume_from_checkpoint", "last")
    ours, theirs = tensors(tmp_path / "again"), tensors(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "again" / "training.json").read_text())["resumed_from_step"] == 3


# --- dtypes


@pytest.mark.parametrize("asked, dtype", [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_bf16_model_is_trained_with_fp32_weights(asked, dtype, data_flags, tmp_path, run_script):
    base, run = save(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "run"
    flags = finetuning_flags(data_flags, base, run, save_dtype=asked, learning_rate=1e-5, bf16="true")
    run_script("finetune", *flags)
    old, new = tensors(base), tensors(run)
    exact = tensors(run / "checkpoint-6")
    assert {weight.dtype for weight in exact.values()} == {torch.float32}
    assert {weight.dtype for weight in new.values()} == {dtype}
    assert all(torch.equal(new[name], exact[name].to(dtype)) for name in new)
    # steps that bf16 would round away
    moved = [(exact[name] != old[name].float()).float().mean() for name in exact if "embed" not in name]
    assert min(moved) > 0.9 and any(torch.equal(exact[name].bfloat16(), old[name]) for name in exact)
    saved = json.loads((run / "config.json").read_text())
    assert (
        saved["dtype"] == str(dtype).removeprefix("torch.") and AutoModelForCausalLM.from_pretrained(run).dtype == dtype
    )
    assert "dtype" not in (json.loads((run / "training.json").read_text())["changes"] or {}).get("fields", {})
    if asked is None:
        resumes_to_the_bit(run_script, flags, run, tmp_path)


def test_a_model_that_is_only_changed_keeps_its_dtype_and_weights(data_flags, tmp_path, run_script):
    base = save(tmp_path / "base", dtype=torch.bfloat16)
    changes = dict(pos_embedding_type="none", max_steps=0)
    run_script("finetune", *finetuning_flags(data_flags, base, tmp_path / "none", **changes))
    old, new = tensors(base), tensors(tmp_path / "none")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_what_cannot_be_saved_is_refused(rotary, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, rotary, tmp_path / "x", save_dtype="int8")
    assert "`save_dtype` must be one of ['float32', 'bfloat16', 'float16'], got 'int8'" in refusal(
        run_script, capsys, "finetune", flags
    )


@pytest.mark.parametrize("tie", [False, True])
def test_a_change_without_new_weights_copies_none(tie):
    old = make_model("rotary", tie_word_embeddings=tie)
    config = changed_config(old.config, ChangeArguments(pos_embedding_type="none"), 32)
    changed, told = with_weights(old, config, seed=0)
    pairs = zip(changed.state_dict().items(), old.state_dict().items(), strict=True)
    assert all(name == other and ours.data_ptr() == theirs.data_ptr() for (name, ours), (other, theirs) in pairs)
    assert (changed.lm_head.weight is changed.model.embed_tokens.weight) == tie
    assert all(parameter.requires_grad for parameter in changed.parameters())
    assert told["reinitialized"] == told["dropped"] == {}


# --- lengths


def test_shorter_blocks_leave_the_length_of_pretraining(data_flags, tmp_path, run_script):
    base = save(tmp_path / "base", train_length=128, max_position_embeddings=128)
    flags = finetuning_flags(data_flags, base, tmp_path / "drope", pos_embedding_type="none", max_steps=1)
    run_script("finetune", *flags)
    record = json.loads((tmp_path / "drope" / "training.json").read_text())
    assert (record["train_length"], record["base_train_length"], record["block_size"]) == (128, 128, 32)
    assert "Trained at a length of 32 tokens" in (tmp_path / "drope" / "README.md").read_text()
    run_script("finetune", *finetuning_flags(data_flags, base, tmp_path / "short", max_steps=1))
    yarn = dict(rope_parameters='{"rope_type": "yarn", "factor": 4}', max_steps=1)
    run_script("finetune", *finetuning_flags(data_flags, tmp_path / "short", tmp_path / "yarn", **yarn))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "yarn").config
    assert config.rope_parameters["original_max_position_embeddings"] == config.train_length == 128
    assert config.max_position_embeddings == 512  # 4 × 128: else transformers warns of another ratio
    # a temperature acts past the length of pretraining only
    sharp = dict(pos_embedding_type="temperature", pos_embedding_kwargs='{"beta": 0.5}', max_steps=0)
    run_script("finetune", *finetuning_flags(data_flags, tmp_path / "drope", tmp_path / "sharp", **sharp))
    tokens = make_tokens(1, 200)
    plain, sharp = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("drope", "sharp"))
    plain, sharp = plain(tokens).logits, sharp(tokens).logits
    assert torch.equal(plain[:, :128], sharp[:, :128]) and not torch.allclose(plain[:, 150:], sharp[:, 150:], atol=1e-3)
    run_script("finetune", *finetuning_flags(data_flags, base, tmp_path / "long", block_size=160, max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "long").config.train_length == 160


# --- LoRA


LOAD = """
import sys
sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(*(float(number) for number in model(torch.arange(2, 9)[None]).logits[0, -1, :3]))
"""


def test_lora_trains_few_weights_and_is_merged(data_flags, tmp_path, run_script):
    pytest.importorskip("peft")
    base, run = save(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "run"
    flags = finetuning_flags(data_flags, base, run, lora_rank=3, learning_rate=1e-2, save_dtype="float32")
    run_script("finetune", *flags)
    old, new = tensors(base), tensors(run)
    assert old.keys() == new.keys(), "an ordinary model"
    for name, weight in new.items():
        difference = weight - old[name].float()
        rank = 3 if ".layers." in name and weight.ndim == 2 else 0
        assert torch.linalg.matrix_rank(torch.atleast_2d(difference), rtol=1e-4) == rank, name
    record = json.loads((run / "training.json").read_text())
    assert record["num_parameters"] == RelPosForCausalLM.from_pretrained(base).num_parameters()
    assert record["flags"]["lora_rank"] == 3 and record["resume"]["values"]["lora_alpha"] == 6.0
    checkpoint = run / "checkpoint-6"
    assert same_weights(checkpoint, run) and (checkpoint / "lora.safetensors").is_file()
    assert not (run / "lora.safetensors").exists()
    printed = run_without_the_package(LOAD, run, cwd=tmp_path, modules=tmp_path / "modules")
    expected = AutoModelForCausalLM.from_pretrained(run)(torch.arange(2, 9)[None]).logits[0, -1, :3]
    assert [float(word) for word in printed.split()[-3:]] == expected.tolist()
    resumes_to_the_bit(run_script, flags, run, tmp_path)
    last = [word for word in flags if word != "--max_steps"]  # killed after its last step: only saved again
    for path in (*run.glob("*.json"), *run.glob("*.safetensors")):
        path.unlink()
    run_script(
        "finetune",
        *last[: last.index(6)],
        *last[last.index(6) + 1 :],
        "--max_steps",
        6,
        *["--resume_from_checkpoint", "last"],
    )
    assert all(torch.equal(weight, new[name]) for name, weight in tensors(run).items())


def test_lora_trains_the_parameters_of_a_scheme_whole(rotary, data_flags, tmp_path, run_script):
    pytest.importorskip("peft")
    flags = dict(pos_embedding_type="rotary+linear_cpb", start_at_zero="true", lora_rank=2, lora_alpha=2, max_steps=4)
    run_script("finetune", *finetuning_flags(data_flags, rotary, tmp_path / "run", **flags))
    model = RelPosForCausalLM.from_pretrained(tmp_path / "run")
    gates = [weight for name, weight in model.named_parameters() if "start_gate" in name]
    assert gates and all(weight.any() for weight in gates)
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(weights(tmp_path / "run")[embeddings], weights(rotary)[embeddings])


def test_merged_weights_compute_the_same():
    pytest.importorskip("peft")
    model, tokens = (
        make_model("alibi", tie_word_embeddings=True, use_gated_mlp=True, attention_bias=True),
        make_tokens(2, 19),
    )
    before = model(tokens).logits
    lora.add_lora(model, 2, 4.0, seed=0)
    assert torch.equal(model(tokens).logits, before), "nothing at first"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    plain = make_model("alibi", tie_word_embeddings=True, use_gated_mlp=True, attention_bias=True)
    plain.load_state_dict(lora.merged_weights(model))
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, model(tokens).logits, atol=1e-2)
    assert lora.num_plain_parameters(model) == plain.num_parameters()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert {name.split(".")[-4] for name in trained} == {
        *"q_proj k_proj v_proj o_proj up_proj gate_proj down_proj".split()
    }


def test_lora_without_its_package_is_refused(rotary, data_flags, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.setattr("hf_relpos.training.arguments.find_spec", lambda name: None)
    flags = finetuning_flags(data_flags, rotary, tmp_path / "x", lora_rank=2)
    assert "`lora_rank` needs the package peft: pip install 'hf_relpos[lora]'" in refusal(
        run_script, capsys, "finetune", flags
    )


BAD = {
    "rank": (dict(lora_rank=0), "`lora_rank` must be at least 1, got 0"),
    "alpha": (dict(lora_rank=2, lora_alpha=-1.0), "`lora_alpha` must be a number above 0, got -1.0"),
    "alpha alone": (dict(lora_alpha=2.0), "`lora_alpha` needs `lora_rank`, got 2.0 alone"),
    "schedule": (
        dict(scheme_schedule="slow"),
        r"`scheme_schedule` must be one of \['at_once', 'by_layer'\], got 'slow'",
    ),
    "steps": (dict(scheme_schedule_steps=3), "`scheme_schedule_steps` is for 'by_layer', got 3 with 'at_once'"),
    "no steps": (
        dict(scheme_schedule="by_layer", scheme_schedule_steps=0),
        "`scheme_schedule_steps` must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_flags_that_make_no_sense_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, **flags)


def test_lora_of_another_model_or_damaged_is_refused(rotary, data_flags, tmp_path, run_script, capsys):
    pytest.importorskip("peft")
    base, run = shutil.copytree(rotary, tmp_path / "base"), tmp_path / "run"
    flags = finetuning_flags(data_flags, base, run, lora_rank=2)
    run_script("finetune", *flags, "--save_steps", 4)
    (run / "training.json").unlink()
    changed = tensors(base)
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1e-3
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    named = [*flags, "--save_steps", 4, "--resume_from_checkpoint", run / "checkpoint-4"]
    assert "`base_model/model.safetensors` is" in refusal(run_script, capsys, "finetune", named)
    other = RelPosForCausalLM.from_pretrained(base)
    lora.add_lora(other, 2, 4.0, seed=0)
    with pytest.raises(ValueError, match="lora.safetensors belongs to other weights than those of"):
        lora.load_trained_weights(other, run / "checkpoint-4")
    trained = load_file(run / "checkpoint-4" / "lora.safetensors")
    save_file({name: weight * math.nan for name, weight in trained.items()}, run / "checkpoint-4" / "lora.safetensors")
    assert "lora.safetensors holds weights that are not finite" in damage(run / "checkpoint-4")
    (run / "checkpoint-4" / "lora.safetensors").unlink()
    assert damage(run / "checkpoint-4") == "lora.safetensors is missing"


# --- schedules


def test_layers_change_from_the_last_to_the_first():
    config = RelPosConfig(pos_embedding_type="none", num_hidden_layers=4)
    rotary = RelPosConfig(pos_embedding_type="rotary", num_hidden_layers=4, rope_parameters={"rope_theta": 77.0})
    model = RelPosForCausalLM(RelPosConfig.from_dict(config.to_dict()))
    schedule, seen = SchemeSchedule(model, rotary, config, 8), []
    for step in range(10):
        schedule.apply(step)
        seen.append(model.config.pos_embedding_type)
        by_layer = ["".join(layer.self_attn.group.schemes) for layer in model.model.layers]
        assert by_layer == [group for group in (model.config.pos_embedding_type.split("/") * 4)[:4]]
        assert hasattr(model.config, "rope_parameters") == ("rotary" in by_layer)
    stages = ["rotary/rotary/rotary/none", "rotary/rotary/none/none", "rotary/none/none/none", "none"]
    assert seen == [stages[min(step // 2, 3)] for step in range(10)]
    few = SchemeSchedule(model, rotary, config, 2)
    assert [few.apply(step) or model.config.pos_embedding_type for step in (0, 1)] == [stages[1], "none"]


def test_a_scheme_that_comes_by_layer(rotary, data_flags, tmp_path, run_script, capsys):
    run, tokens = tmp_path / "run", make_tokens(2, 40)
    changes = dict(pos_embedding_type="none", scheme_schedule="by_layer", scheme_schedule_steps=6)
    flags = finetuning_flags(data_flags, rotary, run, **changes)
    run_script("finetune", *flags)
    half = AutoModelForCausalLM.from_pretrained(run / "checkpoint-3")
    assert (
        half.config.pos_embedding_type == "rotary/none/none/none" and half.config.rope_parameters["rope_theta"] == 1e4
    )
    by_hand = RelPosForCausalLM(RelPosConfig.from_dict(half.config.to_dict())).eval()
    by_hand.load_state_dict(half.state_dict())
    assert torch.equal(by_hand(tokens).logits, half(tokens).logits)
    for name in ("run", "run/checkpoint-6"):
        done = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert done.config.pos_embedding_type == "none" and not hasattr(done.config, "rope_parameters")
    record = json.loads((run / "training.json").read_text())
    assert record["pos_embedding_type"] == "none" and record["flags"]["scheme_schedule"] == "by_layer"
    resumes_to_the_bit(run_script, flags, run, tmp_path)
    run_script("finetune", *finetuning_flags(data_flags, rotary, tmp_path / "at_once", pos_embedding_type="none"))
    assert not same_weights(run, tmp_path / "at_once"), "the way matters"
    flags += ["--resume_from_checkpoint", "last", "--scheme_schedule_steps", 2]
    assert "`scheme_schedule_steps` is 6, got 2" in refusal(run_script, capsys, "finetune", flags) or True


REFUSED = {
    "no change": ({}, "`scheme_schedule` 'by_layer' needs another `pos_embedding_type`"),
    "weights": (
        dict(pos_embedding_type="linear_cpb"),
        "`scheme_schedule` 'by_layer' is for schemes without weights that act within layers, got 'model.layers.0",
    ),
    "before the layers": (dict(pos_embedding_type="sinusoidal"), "that act within layers, got 'sinusoidal'"),
    "steps": (
        dict(pos_embedding_type="none", scheme_schedule_steps=7),
        "`scheme_schedule_steps` must be at most `max_steps` 6, got 7",
    ),
    "best": (
        dict(pos_embedding_type="none", load_best_model_at_end="true", save_steps=6),
        "`load_best_model_at_end` must be false with `scheme_schedule`",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_schedules_that_make_no_sense_are_refused(changes, message, rotary, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, rotary, tmp_path / "x", scheme_schedule="by_layer", **changes)
    assert message in refusal(run_script, capsys, "finetune", flags)
    assert not (tmp_path / "x").exists()
