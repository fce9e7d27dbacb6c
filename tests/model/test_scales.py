"""The scale of what enters the first layer, and the initial weights."""

import json
import math

import pytest
import torch
from conftest import make_model, make_tokens

from hf_relpos import RelPosConfig, RelPosForCausalLM
from hf_relpos.training.model_setup import new_model


SIZES = dict(vocab_size=4096, hidden_size=256, num_attention_heads=4, num_hidden_layers=2)


def test_new_models_have_unit_embeddings_and_weights_of_their_inputs():
    torch.manual_seed(0)
    config = RelPosConfig(**SIZES, pos_embedding_type="none", pad_token_id=3)
    assert (config.initializer, config.embedding_multiplier) == ("fan_in", 16.0)
    model = RelPosForCausalLM(config)
    embeddings = model.model.embed_tokens.weight.detach() * config.embedding_multiplier
    assert embeddings.std() == pytest.approx(1.0, rel=0.01) and not embeddings[3].any()
    outputs = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        scale = 0.5 if module in outputs else 1.0  # 1 / sqrt(2 · layers)
        assert module.weight.detach().std() == pytest.approx(scale * module.in_features**-0.5, rel=0.02)


def test_a_range_that_is_given_is_that_of_all_weights():
    torch.manual_seed(0)
    model = RelPosForCausalLM(RelPosConfig(**SIZES, pos_embedding_type="none", initializer_range=0.05))
    assert model.config.initializer == "normal"
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert weight.detach().std() == pytest.approx(0.05, rel=0.02), name


def test_the_multiplier_scales_embeddings_however_they_come():
    model, tokens = make_model("rotary", embedding_multiplier=3.0), make_tokens(2, 9)
    logits = model(tokens).logits
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, logits)
    model.config.embedding_multiplier = 1.0
    assert not torch.allclose(model(tokens).logits, logits)
    torch.testing.assert_close(model(inputs_embeds=3 * model.get_input_embeddings()(tokens)).logits, logits)


def test_a_saved_configuration_without_scales_has_those_of_its_time(tmp_path):
    fields = RelPosConfig(**SIZES).to_dict()
    assert RelPosConfig.from_dict(fields).embedding_multiplier == 16.0
    old = {k: v for k, v in fields.items() if k not in ("initializer", "embedding_multiplier")}
    (tmp_path / "config.json").write_text(json.dumps(old | {"initializer_range": 0.03}))
    loaded = [RelPosConfig.from_pretrained(tmp_path), RelPosConfig.from_json_file(tmp_path / "config.json")]
    for config in loaded:
        scales = config.initializer, config.embedding_multiplier, config.initializer_range
        assert scales == ("normal", 1.0, 0.03)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("initializer", "xavier", r"`initializer` must be one of \['fan_in', 'normal'\], got 'xavier'"),
        ("embedding_multiplier", -1.0, "`embedding_multiplier` must be a number of at least 0, got -1.0"),
        ("embedding_multiplier", "sqrt", "`embedding_multiplier` must be a number of at least 0, got 'sqrt'"),
    ],
)
def test_scales_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        RelPosConfig(**{field: value})


def test_what_all_schemes_have_begins_the_same():
    models = [
        new_model(RelPosConfig(**SIZES, pos_embedding_type=name), 7) for name in ("none", "linear_cpb", "learned")
    ]
    first = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(model.state_dict()[name], weight) for name, weight in first.items())


def test_resized_embeddings_keep_their_scale():
    torch.manual_seed(0)
    model = RelPosForCausalLM(RelPosConfig(**SIZES, pos_embedding_type="none"))
    model.resize_token_embeddings(SIZES["vocab_size"] + 2000, mean_resizing=False)
    new = model.get_input_embeddings().weight.detach()[-2000:]
    assert new.std() == pytest.approx(1 / math.sqrt(SIZES["hidden_size"]), rel=0.03)
