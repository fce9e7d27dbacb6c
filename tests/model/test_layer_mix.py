"""Layers that differ: schemes in turn, sliding windows, and both against transformers' own models."""

import pytest
import torch
from conftest import SCHEMES, make_config, make_model, make_tokens, table_path
from torch.testing import assert_close
from transformers import AutoConfig, DynamicCache, MistralConfig, MistralForCausalLM, StaticCache
from transformers.masking_utils import create_masks_for_generate

from hf_relpos import RelPosConfig, RelPosForCausalLM
from hf_relpos.model.scheme_registry import layer_groups
from hf_relpos.results.groups import VARIED
from hf_relpos.training.model_setup import ModelArguments, new_config


CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SLIDING, FULL = "sliding_attention", "full_attention"
# schemes → what the layers are; three in the window, one that sees all, and what a table, a matrix and neither do
WINDOWS = {
    "rotary/rotary/rotary/none": [SLIDING, SLIDING, SLIDING, FULL],
    "alibi+rotary/none": [FULL, SLIDING, FULL, SLIDING],
    "learned+log_cpb/learned": [SLIDING, SLIDING, FULL, FULL],
    "alibi": [SLIDING] * 4,
    "cope/dape+alibi": [SLIDING, SLIDING, FULL, FULL],
    "fox+rotary/fox": [SLIDING, SLIDING, FULL, FULL],
    "cope/dape": [SLIDING, SLIDING, FULL, FULL],
    "fire": [SLIDING, FULL, SLIDING, FULL],
    "fire+fox/alibi+fire": [SLIDING, FULL, SLIDING, SLIDING],
}
each_mix = pytest.mark.parametrize("scheme", WINDOWS)


def make_mix(scheme, **overrides):
    fields = dict(num_hidden_layers=4, sliding_window=5, layer_types=WINDOWS[scheme], num_key_value_heads=2)
    return make_model(scheme, **{**fields, **overrides})


def test_schemes_repeat_over_the_layers():
    config = make_config("sinusoidal/alibi+sinusoidal/sinusoidal+rotary", num_hidden_layers=7)
    assert [group.schemes for group in layer_groups(config)] == [
        ("sinusoidal",),
        ("alibi", "sinusoidal"),
        ("sinusoidal", "rotary"),
    ] * 2 + [("sinusoidal",)]
    model = make_model("alibi/linear_cpb+alibi/none", num_hidden_layers=3)
    assert list(model.model.position_embeddings) == ["alibi", "none"], "one module for all layers that share it"
    own = [list(layer.self_attn.position_embeddings) for layer in model.model.layers]
    assert own == [[], ["linear_cpb"], []]
    tables = model.model.distance_bias(9)
    assert not torch.equal(tables[0], tables[1]) and not tables[2].any()
    assert model.attention_path() == f"{table_path()}/sdpa"
    assert make_model("alibi/rotary", attn_implementation="eager").attention_path() == "eager:dense_bias/eager"


def test_a_repeated_name_is_the_plain_scheme():
    for scheme in ("linear_cpb", "rotary", "learned"):
        model, plain = make_model(f"{scheme}/{scheme}"), make_model(scheme)
        model.load_state_dict(plain.state_dict())
        tokens = make_tokens(2, 15)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_windows_are_mistrals(implementation):
    """Rotary with a window in all layers, and cached steps, beside transformers' own code."""
    options = dict(sliding_window=6, num_key_value_heads=2, embedding_multiplier=1.0)
    model = make_model("rotary", **options, attn_implementation=implementation)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window", "pad_token_id")
    fields += ("eos_token_id",)
    config = MistralConfig(**{name: getattr(model.config, name) for name in fields}, attn_implementation=implementation)
    twin = MistralForCausalLM(config).eval()
    for theirs, ours in zip(twin.model.layers, model.model.layers):
        theirs.mlp = ours.mlp
    twin.load_state_dict(model.state_dict())
    tokens = make_tokens(2, 30)
    for length in (4, 30):
        assert_close(model(tokens[:, :length]).logits, twin(tokens[:, :length]).logits, rtol=0, atol=2e-6)
    generated = [each.generate(tokens, max_new_tokens=9, do_sample=False) for each in (model, twin)]
    assert torch.equal(*generated)


@each_mix
def test_no_window_is_a_window_that_is_never_full(scheme):
    model, tokens = make_mix(scheme, sliding_window=40), make_tokens(2, 30)
    plain = make_model(scheme, num_hidden_layers=4, num_key_value_heads=2)
    assert_close(model(tokens).logits, plain(tokens).logits, **CLOSE)
    narrow = make_mix(scheme)
    assert (narrow(tokens).logits - plain(tokens).logits)[:, 6:].abs().max() > 1e-2
    assert_close(narrow(tokens[:, :5]).logits, plain(tokens[:, :5]).logits, **CLOSE)


def test_what_lies_outside_of_all_windows_is_not_seen():
    model, tokens = make_mix("alibi"), make_tokens(1, 40)
    reach = 4 * (5 - 1)  # four layers
    changed = tokens.clone()
    changed[0, 10] = 1 + tokens[0, 10] % 90
    moved = (model(tokens).logits - model(changed).logits)[0].abs().amax(-1)
    assert moved[10 : 10 + reach + 1].min() > 1e-5 and moved[10 + reach + 1 :].max() == 0 and moved[:10].max() == 0


# but those that count the keys which a query sees, and parts in turn
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "cope" not in scheme and "/" not in scheme])
@pytest.mark.parametrize("start", [0, 20])
def test_a_window_hides_keys_and_moves_no_bias(scheme, start):
    """Of every scheme: the weights in the window are those without one, divided by their sum; FIRE's too, whose bias
    depends on the number of tokens before the query, far more than a window has."""
    tokens, mask = make_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    position_ids = start + (mask.cumsum(-1) - 1).clamp(min=0)
    given = dict(attention_mask=mask, position_ids=position_ids, output_attentions=True, use_cache=False)
    options = dict(num_hidden_layers=1, attn_implementation="eager", layer_types=None)
    whole, narrow = (make_model(scheme, **options, sliding_window=window) for window in (None, 5))
    weights, narrow_weights = (model(tokens, **given).attentions[0] for model in (whole, narrow))
    visible = torch.arange(30)[:, None] - torch.arange(30) < 5
    expected = torch.where(visible, weights, 0.0)
    expected = expected / expected.sum(-1, keepdim=True)
    real = mask.bool()[:, None, :, None]
    assert_close(torch.where(real, narrow_weights, 0.0), torch.where(real, expected, 0.0), rtol=1e-4, atol=1e-6)


@each_mix
@pytest.mark.parametrize("cache", ["sliding", "whole", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_caches_with_left_padding(scheme, cache, implementation):
    """Chunks and steps past the window, which a cache for it drops keys behind, against the whole unpadded row."""
    model, tokens = make_mix(scheme, attn_implementation=implementation), make_tokens(2, 23)
    expected = model(tokens, use_cache=False).logits
    padded, mask = torch.cat((torch.zeros(2, 6, dtype=torch.long), tokens), 1), torch.ones(2, 29, dtype=torch.long)
    padded[1], mask[0, :6] = torch.cat((tokens[1], tokens[1, :6])), 0
    past = {
        "sliding": lambda: DynamicCache(config=model.config),
        "whole": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[cache]()
    parts, kept = [], 0
    for stop in (3, 8, 9, 10, 18, 19, 20, 29):
        with torch.no_grad():
            output = model(padded[:, kept:stop], attention_mask=mask[:, :stop], past_key_values=past)
        parts.append(output.logits)
        kept = stop
    logits = torch.cat(parts, dim=1)
    assert_close(logits[0, 6:], expected[0], **CLOSE)
    assert_close(logits[1, :23], expected[1], **CLOSE)
    if cache == "sliding":
        lengths = [layer.keys.shape[2] for layer in past.layers]
        assert lengths == [4 if kind == SLIDING else 29 for kind in WINDOWS[scheme]]


@each_mix
def test_generation(scheme):
    """Greedy and by beams, with each cache, in a batch with padding: the same tokens as without a cache."""
    model = make_mix(scheme)
    tokens, mask = make_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=11, min_new_tokens=11, do_sample=False)
    for beams in (1, 3):
        expected = model.generate(tokens, **options, num_beams=beams, use_cache=False)
        assert torch.equal(model.generate(tokens, **options, num_beams=beams), expected)
    expected = model.generate(tokens, **options, use_cache=False)
    static = model.generate(tokens, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    assert torch.equal(model.generate(tokens, **options, prefill_chunk_size=4), expected)


@each_mix
def test_ready_masks_by_layer_type(scheme):
    model, tokens = make_mix(scheme), make_tokens(2, 14)
    masks = create_masks_for_generate(
        model.config, torch.empty(2, 14, 0), torch.ones(2, 14), None, and_mask_function=lambda b, h, q, k: q >= k
    )
    assert set(masks) == set(WINDOWS[scheme])
    assert_close(model(tokens, attention_mask=masks).logits, model(tokens).logits, **CLOSE)
    with pytest.raises(ValueError, match="`attention_mask` of 4 dimensions must be a dictionary"):
        model(tokens, attention_mask=masks[SLIDING])


@each_mix
def test_packed_rows_and_gradients(scheme):
    tokens, results = make_tokens(2, 26), []
    position_ids = torch.cat((torch.arange(9), torch.arange(17)))[None]
    for implementation in ("eager", "sdpa"):
        model = make_mix(scheme, attn_implementation=implementation).train()
        whole = model(tokens, position_ids=position_ids).logits
        for part in (slice(0, 9), slice(9, 26)):
            assert_close(whole[:, part], model(tokens[:, part]).logits, **CLOSE)
        model(tokens, position_ids=position_ids, labels=tokens).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@each_mix
def test_save_load_and_configuration(scheme, tmp_path):
    model, tokens = make_mix(scheme), make_tokens(1, 12)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.layer_types, config.sliding_window) == (WINDOWS[scheme], 5)
    assert torch.equal(RelPosForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_compiled_mix():
    torch._dynamo.reset()
    model, tokens = make_mix("alibi+rotary/none"), make_tokens(2, 17)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(tokens).logits, model(tokens).logits, **CLOSE)


def test_a_window_alone_is_for_all_layers():
    config = RelPosConfig.from_size("xsmall", pos_embedding_type="alibi", sliding_window=64)
    assert config.layer_types == [SLIDING] * 4
    assert not hasattr(RelPosConfig(), "layer_types"), "transformers takes the field for a list"


BAD = {
    "unknown part": (dict(pos_embedding_type="alibi/"), "`pos_embedding_type` .* must be one of .*'alibi/'"),
    "none in a pair": (dict(pos_embedding_type="alibi/none+rotary"), "other than 'none'"),
    "more parts than layers": (
        dict(pos_embedding_type="alibi/none/alibi", num_hidden_layers=2),
        "at most `num_hidden_layers`=2 parts",
    ),
    "embedding in some layers": (
        dict(pos_embedding_type="learned/none"),
        "must name 'learned' between all '/' or nowhere, since it acts before the layers",
    ),
    "wrong number of layer types": (dict(layer_types=[FULL]), "`layer_types` must be a list of `num_hidden_layers`=4"),
    "unknown layer type": (dict(layer_types=["chunked_attention"] * 4), "of .'full_attention', 'sliding_attention'."),
    "no window": (dict(layer_types=[SLIDING] * 4), "`sliding_window` must be given if, and only if"),
    "window for nobody": (dict(layer_types=[FULL] * 4, sliding_window=9), "`sliding_window` must be given if, and"),
    "window of 0": (dict(sliding_window=0), "`sliding_window` must be an integer of at least 1"),
    "window of 1": (dict(sliding_window=1), "`sliding_window` must be at least 2, got 1"),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        RelPosConfig(**fields)


def test_flags_of_layers():
    flags = dict(pos_embedding_type="rotary/none", layer_types="sliding/sliding/full", sliding_window=32)
    config = new_config(ModelArguments(model_size="small", **flags), 128)
    assert config.layer_types == [SLIDING, SLIDING, FULL] * 2 and config.sliding_window == 32
    config = new_config(ModelArguments(config_overrides="num_hidden_layers=2", **flags), 128)
    assert config.layer_types == [SLIDING, SLIDING]
    with pytest.raises(ValueError, match="`layer_types` must be a list of .* got .'wide_attention'"):
        new_config(ModelArguments(layer_types="wide", sliding_window=3), 128)
    assert VARIED["layer_types"]([SLIDING, SLIDING, FULL] * 2) == "sliding/sliding/full"
    assert VARIED["layer_types"](None) == "" and VARIED["sliding_window"](32) == "window 32"
