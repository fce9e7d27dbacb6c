"""A model with rotary positions as a Llama: the same logits, or a refusal that names the field."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer, make_tokens
from helpers import refusal
from safetensors.torch import load_file
from tiny_models import CONFIGS, make_original, padded_tokens
from transformers import AutoTokenizer, LlamaForCausalLM

import hf_relpos
from hf_relpos import RelPosForCausalLM


LLAMAS = [name for name in CONFIGS if name.startswith("llama")]
LLAMA = dict(use_gated_mlp=True, hidden_act="silu", num_key_value_heads=2)


def load_llama(folder):
    model, loading = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_import_and_export_give_the_original_back(name, dtype, tmp_path, run_script):
    original, (tokens, mask) = make_original(name, dtype, "sdpa"), padded_tokens()
    original.generation_config.temperature, original.generation_config.do_sample = 0.5, True
    original.save_pretrained(tmp_path / "original")
    run_script("import_model", tmp_path / "original", tmp_path / "imported")
    run_script("export_model", tmp_path / "imported", tmp_path / "exported")
    exported = load_llama(tmp_path / "exported")
    assert exported.dtype == dtype and exported.generation_config.temperature == 0.5
    assert torch.equal(exported(tokens, attention_mask=mask).logits, original(tokens, attention_mask=mask).logits)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("original", "exported"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    fields = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("original", "exported")]
    differing = {key for key in fields[0] | fields[1] if fields[0].get(key) != fields[1].get(key)}
    assert differing <= {"use_cache", "_name_or_path"}, differing


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("rope_parameters", [None, dict(rope_type="yarn", factor=4.0)], ids=["plain", "yarn"])
@torch.no_grad()
def test_a_model_trained_here_is_served_as_a_llama(rope_parameters, tied, tmp_path, run_script):
    """Its multiplier of the embeddings goes into them."""
    model = make_model(
        "rotary", **LLAMA, rope_parameters=rope_parameters, tie_word_embeddings=tied, embedding_multiplier=3.0
    )
    tokens, expected = make_tokens(2, 30), model(make_tokens(2, 30)).logits
    assert torch.equal(hf_relpos.export_model(model)(tokens).logits, expected)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer("{{ messages }}").save_pretrained(tmp_path / "model")
    run_script("export_model", tmp_path / "model", tmp_path / "llama")
    exported = load_llama(tmp_path / "llama")
    assert torch.equal(exported(tokens).logits, expected)
    assert exported.config.tie_word_embeddings is False
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer.decode(tokenizer("union").input_ids) == "union"
    assert torch.equal(hf_relpos.import_model(tmp_path / "llama")(tokens).logits, expected)


REFUSED = {
    "another scheme": ("alibi", LLAMA, "`pos_embedding_type` must be 'rotary' for a Llama, got 'alibi'"),
    "some layers": ("rotary/none", LLAMA, "`pos_embedding_type` must be 'rotary' for a Llama, got 'rotary/none'"),
    "no gate": (
        "rotary",
        {},
        "`use_gated_mlp` must be True for a Llama, got False .*--config_overrides use_gated_mlp=true",
    ),
    "norms": (
        "rotary",
        LLAMA | {"qk_norm": "head"},
        "`qk_norm` must be None for a Llama, got 'head' .*--config_overrides qk_norm=null`\\)",
    ),
    "several": (
        "rotary",
        {"norm_type": "layer_norm"},
        "got False .to train one: `hf-relpos train --config_overrides use_gated_mlp=true,norm_type=rms_norm.",
    ),
    "some biases": (
        "rotary",
        LLAMA | {"attention_bias": True, "attention_out_bias": False},
        "`attention_out_bias` must be True for a Llama, got False",
    ),
    "windows": (
        "rotary",
        LLAMA | {"sliding_window": 9},
        "`sliding_window` must be None for a Llama, got 9 .to train one: `hf-relpos train` without --sliding_window",
    ),
    "a part of the channels": (
        "rotary",
        LLAMA | {"partial_rotary_factor": 0.5},
        "`partial_rotary_factor` must be 1 for a Llama, got 0.5",
    ),
    "proportional": (
        "rotary",
        LLAMA | {"rope_parameters": dict(rope_type="proportional")},
        "`rope_parameters` 'rope_type' must be one of .* for a Llama, got 'proportional'",
    ),
}


@pytest.mark.parametrize("scheme, fields, message", REFUSED.values(), ids=REFUSED)
def test_what_a_llama_has_not_is_refused(scheme, fields, message):
    with pytest.raises(ValueError, match=message):
        hf_relpos.export_model(make_model(scheme, **fields))


def test_adapters_must_be_merged():
    """A Llama that finds none of its weights is made anew, at random."""
    peft = pytest.importorskip("peft")
    model, tokens = make_model("rotary", **LLAMA), make_tokens(2, 9)
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False))
    for each in (adapted, model, adapted.base_model.model.model):
        with pytest.raises(ValueError, match="`model` must have the weights of a RelPosForCausalLM .* is too many"):
            hf_relpos.export_model(each)
    merged = adapted.merge_and_unload()
    assert torch.equal(hf_relpos.export_model(merged)(tokens).logits, merged(tokens).logits)


def test_nothing_is_written_after_a_refusal(tmp_path, run_script, capsys):
    make_model("alibi").save_pretrained(tmp_path / "alibi")
    make_original("llama").save_pretrained(tmp_path / "llama")
    assert "got 'alibi'" in refusal(run_script, capsys, "export_model", [tmp_path / "alibi", tmp_path / "x"])
    assert "must be a model of the family ('relpos'), got 'llama'" in refusal(
        run_script, capsys, "export_model", [tmp_path / "llama", tmp_path / "x"]
    )
    assert "two words are needed" in refusal(run_script, capsys, "export_model", [tmp_path / "llama"])
    assert "exists: choose another folder" in refusal(
        run_script, capsys, "export_model", [tmp_path / "llama", tmp_path / "alibi"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alibi", "llama"]
    assert RelPosForCausalLM.from_pretrained(tmp_path / "alibi")
