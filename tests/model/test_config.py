"""The configuration: names, sizes, round trips, and what it refuses."""

import copy

import pytest
import torch
from conftest import SCHEMES, make_config, make_tokens
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hf_relpos import MODEL_SIZES, RelPosConfig, RelPosForCausalLM
from hf_relpos.model import configuration_checks
from hf_relpos.model.scheme_registry import layer_groups


@pytest.mark.parametrize(
    "size, millions", {"xsmall": 3.2, "small": 10.6, "medium": 25.2, "large": 85.1, "xlarge": 201.5}.items()
)
def test_sizes_have_the_stated_parameters(size, millions):
    config = RelPosConfig.from_size(size, pos_embedding_type="none")
    per_layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    assert config.num_hidden_layers * per_layer / 1e6 == pytest.approx(millions, rel=0.02)
    assert config.head_dim == 64


def test_from_size_takes_overrides():
    config = RelPosConfig.from_size("small", pos_embedding_type="alibi", num_hidden_layers=3, tie_word_embeddings=True)
    assert (config.num_hidden_layers, config.hidden_size, config.pos_embedding_type) == (3, 384, "alibi")
    assert config.tie_word_embeddings and list(MODEL_SIZES)[0] == "xsmall"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip(scheme, tmp_path):
    config = make_config(scheme, train_length=128, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is RelPosConfig
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert hasattr(again, "rope_parameters") == ("rotary" in scheme or scheme == "xpos")


def test_rotary_options_have_one_home(tmp_path):
    by_kwargs = RelPosConfig(pos_embedding_type="rotary", pos_embedding_kwargs={"partial_rotary_factor": 0.5})
    by_field = RelPosConfig(pos_embedding_type="rotary", rope_parameters={"partial_rotary_factor": 0.5})
    assert by_kwargs.to_dict() == by_field.to_dict()
    assert by_kwargs.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    by_kwargs.save_pretrained(tmp_path)
    again = RelPosConfig.from_pretrained(tmp_path, rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 0.5})
    assert again.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("scheme", ["rotary", "xpos", "rotary/none", "scaled_sinusoidal+rotary"])
def test_the_rotation_may_be_given_as_llama_takes_it(scheme, tmp_path):
    theta = RelPosConfig(pos_embedding_type=scheme, rope_theta=5000.0, partial_rotary_factor=0.5, rope_scaling=None)
    assert theta.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert not hasattr(theta, "rope_theta")  # one home, as in Llama
    scaled = dict(pos_embedding_type=scheme, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    expected = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 1.0}
    assert RelPosConfig(**scaled).rope_parameters == expected
    llama = LlamaConfig(rope_theta=5000.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert llama.rope_parameters.items() <= expected.items()
    theta.save_pretrained(tmp_path)
    for given, change in (
        ({}, {}),
        ({"rope_theta": 7000.0}, {"rope_theta": 7000.0}),
        ({"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 1.0}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": None}, {}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7000.0}, {"rope_theta": 7000.0}),
    ):
        again, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **given)
        assert again.rope_parameters == theta.rope_parameters | change and not unused


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor", "rope_scaling"])
@pytest.mark.parametrize("scheme", ["alibi", "none", "linear_cpb"])
def test_the_rotation_is_not_for_schemes_that_do_not_rotate(name, scheme, tmp_path):
    value = {"rope_type": "linear", "factor": 2.0} if name == "rope_scaling" else 0.5
    message = rf"`{name}` is for pos_embedding_type \['rotary', 'xpos'\], got it with '{scheme}'"
    with pytest.raises(ValueError, match=message):
        RelPosConfig(pos_embedding_type=scheme, **{name: value})
    RelPosConfig(pos_embedding_type=scheme, **{name: None}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        RelPosConfig.from_pretrained(tmp_path, **{name: value})


NEAR_MISSES = {
    "pos_embeding_type": "pos_embedding_type",
    "position_embedding_type": "pos_embedding_type",
    "num_hidden_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "hiden_size": "hidden_size",
    "HIDDEN_SIZE": "hidden_size",
    "vocabsize": "vocab_size",
    "num_heads": "num_attention_heads",
    "dropout": "hidden_dropout",
    "rope_parameter": "rope_parameters",
    "ropetheta": "rope_theta",
    "layer_type": "layer_types",
    "output_hidden_state": "output_hidden_states",
}


@pytest.mark.parametrize("name, meant", NEAR_MISSES.items())
def test_a_keyword_that_resembles_a_field_is_refused(name, meant):
    message = f"`{name}` is no field of RelPosConfig: did you mean `{meant}`"
    with pytest.raises(ValueError, match=message):
        RelPosConfig(**{name: 4})
    with pytest.raises(ValueError, match=message):
        RelPosConfig.from_size("xsmall", **{name: 4})


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_other_tools_put_into_a_file_is_kept_and_warned_of(name, caplog):
    with caplog.at_level("WARNING", logger="transformers"):
        config = RelPosConfig.from_dict({**RelPosConfig().to_dict(), name: 4})
    assert getattr(config, name) == 4 and f"`{name}` is no field of RelPosConfig" in caplog.text


def test_misspelt_keywords_of_loading_are_refused(tmp_path):
    RelPosForCausalLM(make_config("linear_cpb")).save_pretrained(tmp_path)
    for load in (RelPosConfig, AutoConfig, RelPosForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="did you mean `hidden_dropout`"):
            load.from_pretrained(tmp_path, hiden_dropout=0.5)
    with pytest.raises(ValueError, match="`max_positions` is no field of RelPosConfig: it follows from the others"):
        RelPosConfig(max_positions=4)


def test_other_unknown_keywords_are_kept_and_warned_of(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_checks.logger, "warning", warned.append)
    config = RelPosConfig(fine_tuned_by="alice", temperature=0.5)
    assert config.fine_tuned_by == "alice" and len(warned) == 2
    assert "`fine_tuned_by` is no field of RelPosConfig" in warned[0] and "`temperature` is not kept" in warned[1]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).fine_tuned_by == "alice" and len(warned) == 3


@pytest.mark.parametrize("scheme", ["rotary", "alibi", "rotary/none"])
def test_what_transformers_stores_is_nothing_to_warn_of(scheme, tmp_path, monkeypatch):
    def fail(message):
        raise AssertionError(message)

    monkeypatch.setattr(configuration_checks.logger, "warning", fail)
    RelPosForCausalLM(make_config(scheme)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype="float32", device_map="cpu"
    )
    RelPosConfig(**model.config.to_dict(), num_labels=3, torch_dtype="float32", quantization_config={})
    AutoConfig.from_pretrained(tmp_path, trust_remote_code=True, output_attentions=True)
    copy.deepcopy(model.config)


BAD = {
    "unknown scheme": (dict(pos_embedding_type="alibii"), r"`pos_embedding_type` .* must be one of \['none'.*'alibii'"),
    "no scheme": (dict(pos_embedding_type=None), r"`pos_embedding_type` .* must be one of .*None"),
    "empty part": (dict(pos_embedding_type="alibi+"), r"`pos_embedding_type` .* must be one of .*'alibi\+'"),
    "none in a pair": (dict(pos_embedding_type="none+alibi"), "other than 'none', got 'none"),
    "twice": (dict(pos_embedding_type="alibi+alibi"), "different schemes"),
    "unknown option": (
        dict(pos_embedding_kwargs={"width": 3}),
        r"`pos_embedding_kwargs`.*\['mlp_width'\], got 'width'",
    ),
    "option of another scheme": (
        dict(pos_embedding_type="alibi", pos_embedding_kwargs={"mlp_width": 3}),
        r"may hold \[\], got 'mlp_width'",
    ),
    "option of the wrong type": (dict(pos_embedding_kwargs={"mlp_width": "8"}), "positive number like 256, got '8'"),
    "option below 1": (dict(pos_embedding_kwargs={"mlp_width": 0}), "positive number like 256, got 0"),
    "options that are no dictionary": (dict(pos_embedding_kwargs=[1]), "must be a dictionary"),
    "one bucket": (
        dict(pos_embedding_type="t5", pos_embedding_kwargs={"num_buckets": 1}),
        "'num_buckets' of at least 2 and 'max_distance' above half of it, got 1 and 128",
    ),
    "buckets past the last": (
        dict(pos_embedding_type="t5", pos_embedding_kwargs={"max_distance": 16}),
        "'max_distance' above half of it, got 32 and 16",
    ),
    "odd sandwich": (dict(pos_embedding_type="sandwich", pos_embedding_kwargs={"d_bar": 127}), "must be even, got 127"),
    "heads": (dict(num_attention_heads=5), "`num_attention_heads` must divide `hidden_size` 256, got 5"),
    "key heads": (dict(num_key_value_heads=3), "`num_key_value_heads` must divide `num_attention_heads` 4, got 3"),
    "no layer": (dict(num_hidden_layers=0), "`num_hidden_layers` must be an integer of at least 1, got 0"),
    "float width": (dict(hidden_size=25.5), "`hidden_size` must be an integer of at least 1, got 25.5"),
    "activation": (dict(hidden_act="relu3"), "`hidden_act` must be one of .*'relu3'"),
    "dropout": (dict(hidden_dropout=1.0), r"`hidden_dropout` must lie in \[0, 1\), got 1.0"),
    "text for a number": (
        dict(initializer_range="1e-3"),
        "`initializer_range` must be a number of at least 0, got '1e-3'",
    ),
    "text for a boolean": (dict(position_start_augmentation="False"), "must be true or false, got 'False'"),
    "odd width": (dict(pos_embedding_type="sinusoidal", hidden_size=35, num_attention_heads=5), "must be even"),
    "rope for others": (dict(rope_parameters={"rope_theta": 1e4}), r"`rope_parameters` is for .*\['rotary', 'xpos'\]"),
    "rope that is no dictionary": (dict(pos_embedding_type="rotary", rope_parameters="x"), "must be a dictionary"),
    "rope of text": (
        dict(pos_embedding_type="rotary", rope_parameters={"rope_theta": "x"}),
        "`rope_parameters` 'rope_theta' must be a positive number, got 'x'",
    ),
    "padding outside": (dict(pad_token_id=60, vocab_size=50), "`pad_token_id` must be below `vocab_size` 50, got 60"),
    "rope type": (
        dict(pos_embedding_type="rotary", rope_parameters={"rope_type": "ntk"}),
        "'rope_type' must be one of .*'yarn'.*, got 'ntk'",
    ),
    "rope type without its factor": (
        dict(pos_embedding_type="rotary", rope_parameters={"rope_type": "yarn"}),
        r"rope_type 'yarn' must have \['factor'\]",
    ),
    "rope key of another type": (
        dict(pos_embedding_type="rotary", rope_parameters={"rope_type": "linear", "factor": 2.0, "beta_fast": 32}),
        r"rope_type 'linear' must have \['factor'\] and may have .*'beta_fast'",
    ),
    "rope factor that shrinks": (
        dict(pos_embedding_type="rotary", rope_parameters={"rope_type": "linear", "factor": 0.5}),
        "'factor' must be at least 1, got 0.5",
    ),
    "too few long factors": (
        dict(
            pos_embedding_type="rotary",
            rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0]},
        ),
        "'long_factor' must hold a number for each of the 32 angles, got 1",
    ),
    "odd rotation": (
        dict(pos_embedding_type="rotary", pos_embedding_kwargs={"partial_rotary_factor": 0.02}),
        "`partial_rotary_factor` must lie in",
    ),
    "two answers": (
        dict(
            pos_embedding_type="rotary",
            pos_embedding_kwargs={"partial_rotary_factor": 0.5},
            rope_parameters={"partial_rotary_factor": 1.0},
        ),
        "disagree about",
    ),
    "two answers by keyword": (
        dict(pos_embedding_type="rotary", rope_theta=5000.0, rope_parameters={"rope_theta": 1e4}),
        "`rope_parameters` and `rope_theta` disagree about 'rope_theta': 10000.0 and 5000.0",
    ),
    "three answers": (
        dict(pos_embedding_type="rotary", rope_theta=5000.0, pos_embedding_kwargs={"rope_theta": 1e4}),
        "disagree about",
    ),
    "two scalings": (
        dict(
            pos_embedding_type="rotary",
            rope_scaling={"type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "dynamic", "factor": 2.0},
        ),
        "`rope_parameters` and `rope_scaling` disagree about 'rope_type': 'dynamic' and 'linear'",
    ),
    "decay of channels that stand still": (
        dict(pos_embedding_type="xpos", rope_parameters={"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        "`partial_rotary_factor` must be 1 for rope_type 'proportional' with 'xpos'.*, got 0.5",
    ),
    "theta of text": (dict(pos_embedding_type="rotary", rope_theta="x"), "'rope_theta' must be a positive number"),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        RelPosConfig(**fields)


def test_refuses_an_unknown_size():
    with pytest.raises(ValueError, match=r"`model_size` must be one of \['xsmall'.*got 'tiny'"):
        RelPosConfig.from_size("tiny")


@pytest.mark.parametrize("auto", [RelPosForCausalLM, AutoModelForCausalLM], ids=["class", "auto"])
def test_refuses_a_checkpoint_of_another_scheme(auto, tmp_path):
    RelPosForCausalLM(make_config("linear_cpb")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`pos_embedding_type` of the checkpoint .* is 'linear_cpb', got 'alibi'"):
        auto.from_pretrained(tmp_path, pos_embedding_type="alibi")
    assert auto.from_pretrained(tmp_path, pos_embedding_type="linear_cpb").config.pos_embedding_type == "linear_cpb"


# saved scheme, keywords of loading → fields of the saved one that are followed on
FOLLOWED = {
    "window": ("alibi", dict(sliding_window=8), {}),
    "windows by layer": ("alibi", dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]), {}),
    "options": ("log_cpb", dict(pos_embedding_kwargs={"mlp_width": 8}), {}),
    "rotation of another scheme": ("fire", dict(pos_embedding_type="rotary"), {}),
    "scheme with an option of its own": ("log_cpb", dict(pos_embedding_type="fire", train_length=64), {}),
    "scheme without options": ("rotary", dict(pos_embedding_type="alibi"), {}),
    "scheme with the same rotation": ("rotary", dict(pos_embedding_type="rotary+fox"), {"rope_theta": 700.0}),
}


@pytest.mark.parametrize("scheme, given, kept", FOLLOWED.values(), ids=FOLLOWED)
def test_keywords_of_loading_are_followed(scheme, given, kept, tmp_path):
    make_config(scheme, **({"rope_theta": 700.0} if scheme == "rotary" else {})).save_pretrained(tmp_path)
    expected = make_config(**{"pos_embedding_type": scheme, **kept, **given})
    expected.save_pretrained(tmp_path / "expected")
    again, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **given)
    assert again.to_dict() | {"_name_or_path": ""} == expected.to_dict() and not unused
    assert layer_groups(again) == layer_groups(expected)


UNCHECKED = {
    "option": (dict(pos_embedding_kwargs={"width": 3}), r"\['mlp_width'\], got 'width'"),
    "dropout": (dict(hidden_dropout=1.0), r"`hidden_dropout` must lie in \[0, 1\), got 1.0"),
    "sampling": (dict(position_sampling="rand"), "`position_sampling` must be None or one of"),
    "layers": (dict(layer_types=["sliding_attention"] * 2), "`sliding_window` must be given if, and only if"),
    "base": (dict(pos_embedding_type="rotary", pos_embedding_kwargs={"rope_theta": -1.0}), "must be a positive number"),
    "rotation": (dict(pos_embedding_type="alibi", rope_theta=5.0), "`rope_theta` is for pos_embedding_type"),
}


@pytest.mark.parametrize("given, message", UNCHECKED.values(), ids=UNCHECKED)
def test_keywords_of_loading_are_checked(given, message, tmp_path):
    make_config("linear_cpb").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        RelPosConfig.from_pretrained(tmp_path, **given)


LATER = {
    "rotation": dict(pos_embedding_type="rotary"),
    "option from another field": dict(pos_embedding_type="fire", train_length=4),
    "window": dict(sliding_window=4),
}


@pytest.mark.parametrize("given", LATER.values(), ids=LATER)
def test_fields_that_are_set_later_are_followed(given):
    config, expected = make_config("alibi"), make_config(**{"pos_embedding_type": "alibi", **given})
    for name, value in given.items():
        setattr(config, name, value)
    models = []
    for each in (config, expected):
        torch.manual_seed(0)
        models.append(RelPosForCausalLM(each).eval())
    tokens = make_tokens(1, 12)
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    assert config.pos_embedding_kwargs == expected.pos_embedding_kwargs


def test_a_model_may_be_cut_short(tmp_path):
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    whole = make_config("rotary/rotary/none", num_hidden_layers=3, sliding_window=6, layer_types=types)
    RelPosForCausalLM(whole).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`layer_types` must have an entry for each of the `num_hidden_layers`=4, got 3"
    ):
        RelPosForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4)
    model = RelPosForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert [layer.self_attn.group for layer in model.model.layers] == layer_groups(whole)[:2]
