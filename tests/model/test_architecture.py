"""The fields of the architecture: their checks, their gradients, and that the default is the model of old."""

import hashlib

import pytest
import torch
from conftest import make_config, make_model, make_tokens

from hf_relpos import RelPosConfig, RelPosForCausalLM


ARCHITECTURES = {
    "llama": dict(use_gated_mlp=True, hidden_act="silu", num_key_value_heads=2),
    "biases": dict(attention_bias=True, attention_out_bias=False, mlp_bias=True),
    "qwen3": dict(use_gated_mlp=True, qk_norm="head", head_dim=10),
    "olmo2": dict(use_gated_mlp=True, qk_norm="layer", norm_placement="after", num_key_value_heads=3),
    "gpt_neox": dict(norm_type="layer_norm", use_parallel_residual=True, attention_bias=True, layer_norm_eps=1e-3),
    "bloom": dict(norm_type="layer_norm", embed_norm=True, mlp_bias=True),
    "mpt": dict(norm_type="layer_norm", norm_bias=False),
}


@pytest.mark.parametrize("scheme", ["rotary", "linear_cpb", "fox"])
@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_an_architecture_is_saved_learns_and_decodes_from_its_cache(fields, scheme, tmp_path):
    model, tokens = make_model(scheme, **fields), make_tokens(2, 21)
    model.save_pretrained(tmp_path)
    loaded = RelPosForCausalLM.from_pretrained(tmp_path)
    assert all(getattr(loaded.config, name) == value for name, value in fields.items())
    logits = loaded(tokens).logits
    assert torch.equal(logits, model(tokens).logits)
    loaded(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loaded.parameters())
    first = model(tokens[:, :13], use_cache=True)
    second = model(tokens[:, 13:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, second), dim=1), logits, rtol=1e-4, atol=1e-4)


def test_default_weights_are_those_of_before_these_fields():
    """Hashes of initial weights, computed at the commit before."""
    for tied, expected in ((False, "45e6b79d59b25016"), (True, "d8afba105d71e6ff")):
        torch.manual_seed(0)
        weights = RelPosForCausalLM(make_config("linear_cpb", tie_word_embeddings=tied)).state_dict()
        found = hashlib.sha256()
        for name, weight in weights.items():
            found.update(name.encode() + weight.numpy().tobytes())
        assert found.hexdigest()[:16] == expected


BAD = {
    "norm_type": ("batch_norm", r"`norm_type` must be one of \['rms_norm', 'layer_norm'\], got 'batch_norm'"),
    "norm_placement": ("both", r"`norm_placement` must be one of \['before', 'after'\], got 'both'"),
    "qk_norm": (True, r"`qk_norm` must be one of \[None, 'head', 'layer'\], got True"),
    "use_gated_mlp": (1, "`use_gated_mlp` must be true or false, got 1"),
    "attention_out_bias": ("no", "`attention_out_bias` must be true or false, got 'no'"),
    "layer_norm_eps": (-1, "`layer_norm_eps` must be a number of at least 0, got -1"),
    "imported_from": ("llama", "`imported_from` must be a dictionary, got 'llama'"),
}


@pytest.mark.parametrize("name", BAD)
def test_fields_are_checked(name):
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        RelPosConfig(**{name: value})


def test_a_parallel_residual_has_its_norms_before():
    with pytest.raises(ValueError, match="`norm_placement` must be 'before' with `use_parallel_residual`"):
        RelPosConfig(norm_placement="after", use_parallel_residual=True)


def test_the_output_of_attention_has_a_bias_as_its_inputs_by_default():
    assert RelPosConfig(attention_bias=True).attention_out_bias and not RelPosConfig().attention_out_bias


def test_the_plan_of_tensor_parallelism_names_what_is_there():
    assert RelPosConfig(use_gated_mlp=True).base_model_tp_plan["layers.*.mlp.gate_proj"] == "colwise"
    assert RelPosConfig().base_model_tp_plan is RelPosConfig.base_model_tp_plan
    assert not any("gate" in name or "norm" in name for name in RelPosConfig.base_model_tp_plan)


def test_a_norm_over_all_heads_refuses_a_part_of_them():
    model = make_model("rotary", qk_norm="layer")
    attention = model.model.layers[0].self_attn
    half = torch.zeros(1, 3, 24)
    with pytest.raises(ValueError, match="`tp_plan` must be None with `qk_norm` 'layer'.* got 2 ranks"):
        attention._norm_queries_and_keys(half, half)
