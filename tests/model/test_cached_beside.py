"""What is kept beside keys and values in a cache follows all that is done to it."""

import copy
import io
import pickle

import pytest
import torch
from conftest import make_config, make_model, make_tokens
from torch.testing import assert_close
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hf_relpos import RelPosForCausalLM
from hf_relpos.model.cached_beside import LayerWithBeside, add_with_beside
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SCHEMES = [name for name, cls in POSITION_EMBEDDINGS.items() if "key_bias" in cls.hooks]
SCHEMES += ["alibi+fox", "fox/rotary", "pope", "pope+fox"]
WINDOW = 6
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def make(scheme, window=False, **overrides):
    """With gates between 0.01 and 0.99, and fewer key heads than query heads."""
    window = {"sliding_window": WINDOW} if window else {}
    model = make_model(scheme, num_key_value_heads=2, **window, **overrides)
    for name, parameter in model.named_parameters():
        if name.endswith("gate_bias"):
            torch.nn.init.normal_(parameter, mean=1.0, std=2.0)
    return model


def quantised(config):
    pytest.importorskip("optimum.quanto", reason="keeps the quantised keys and values")
    # fewer tokens than are ever quantised: the first ones are always
    return QuantizedCache("quanto", config, nbits=4, q_group_size=config.head_dim, residual_length=64)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "quantised": quantised,
}


@each_scheme
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_keys_and_values_have_the_shapes_of_every_model(scheme, kind):
    model = make(scheme)
    cache = CACHES[kind](model.config)
    model(make_tokens(2, 9), past_key_values=cache)
    length = 40 if kind == "static" else 9
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, length, model.config.head_dim)
    assert len(cache) == model.config.num_hidden_layers
    assert isinstance(cache.layers[0], type(CACHES[kind](make_config("none")).layers[0]) if kind != "lazy" else object)
    shapes = [tuple(layer.keys.shape) for layer in cache.layers[0].layers_beside]
    expected = [(2, 6, length, 1)] * ("fox" in scheme) + [(2, 2, length, model.config.head_dim)] * ("pope" in scheme)
    assert shapes == expected
    if "/" in scheme:
        assert not isinstance(cache.layers[1], LayerWithBeside), "its schemes keep nothing"


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_place(operation):
    def changed(cache):
        operation(cache)
        return cache

    return changed


# what a client does → rows of 3 that are left, tokens of 14 that are left, the cache afterwards
OPERATIONS = {
    "nothing": ([0, 1, 2], 14, lambda cache: cache),
    "reorder": ([2, 0, 0], 14, in_place(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))),
    "crop": ([0, 1, 2], 11, in_place(lambda cache: cache.crop(-3))),
    "repeat": ([0, 0, 1, 1, 2, 2], 14, in_place(lambda cache: cache.batch_repeat_interleave(2))),
    "select": ([2, 1], 14, in_place(lambda cache: cache.batch_select_indices(torch.tensor([2, 1])))),
    "deepcopy": ([0, 1, 2], 14, copy.deepcopy),
    "pickle": ([0, 1, 2], 14, pickled),
    "torch.save": ([0, 1, 2], 14, saved),
    "offload": ([0, 1, 2], 14, in_place(lambda cache: [(each.offload(), each.prefetch()) for each in cache.layers])),
}


@pytest.mark.parametrize("scheme", ["fox", "pope+fox"])
@pytest.mark.parametrize("window", [False, True], ids=["whole", "window"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_numbers_follow_what_is_done_to_the_cache(scheme, window, kind, operation):
    rows, length, act = OPERATIONS[operation]
    model, tokens = make(scheme, window), make_tokens(3, 20)
    cache = CACHES[kind](model.config)
    with torch.no_grad():
        model(tokens[:, :9], past_key_values=cache)
        if window and operation == "crop":
            cache.activate_past_recording()
        model(tokens[:, 9:14], past_key_values=cache)
        try:
            cache = act(cache)
        except (AttributeError, RuntimeError):
            plain = CACHES[kind](make_config("none"))
            assert kind == "static" and (window or not hasattr(plain.layers[0], operation)), "as for any model"
            return
        if window and kind == "static" and operation == "crop":
            return  # keys that left the window are gone, for any model
        pieces = []
        for start, stop in ((length, 17), (17, 18), (18, 19), (19, 20)):
            pieces.append(model(tokens[rows, start:stop], past_key_values=cache).logits)
            if window and operation == "crop":
                cache.crop(0)  # as after every forward of assisted decoding
        assert_close(torch.cat(pieces, dim=1), model(tokens[rows]).logits[:, length:], **CLOSE)


@each_scheme
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_is_reset_starts_anew(scheme, kind):
    model, tokens = make(scheme, head_dim=16), make_tokens(2, 12)
    cache = CACHES[kind](model.config)
    with torch.no_grad():
        first = model(tokens, past_key_values=cache).logits
        if kind in ("dynamic", "lazy"):
            model_without = make_model("none")
            other = DynamicCache(config=model_without.config)
            model_without(tokens, past_key_values=other)
            other.reset()
            if other.get_seq_length():
                pytest.skip("dynamic caches of this transformers keep their length")
        cache.reset()
        assert torch.equal(model(tokens, past_key_values=cache).logits, first)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "pope" not in scheme])  # whose zeros are no gates
@pytest.mark.parametrize("kind", CACHES)
def test_keys_without_numbers_add_nothing(scheme, kind):
    """A prefix of keys and values from elsewhere, as prefix tuning makes it: its gates are 1."""
    model, tokens, length = make(scheme, head_dim=16), make_tokens(2, 16), 5
    config = model.config

    def without_numbers_of_the_prefix(original):
        def key_bias(hidden_states):
            numbers = original(hidden_states)
            return torch.cat((torch.zeros_like(numbers[:, :, :length]), numbers[:, :, length:]), dim=2)

        return key_bias

    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        for each in layer.self_attn.position_embeddings.values():
            if "key_bias" in each.hooks:
                each.key_bias = without_numbers_of_the_prefix(each.key_bias)
    with torch.no_grad():
        expected = changed(tokens).logits[:, length:]
        prefix = [layer[:2] for layer in changed(tokens[:, :length], use_cache=True).past_key_values]
        cache = DynamicCache(prefix) if kind == "lazy" else CACHES[kind](config)
        if kind != "lazy":
            for index, (key, value) in enumerate(prefix):
                cache.update(key, value, index)
        pieces = [model(tokens[:, length:12], past_key_values=cache).logits]
        pieces += [model(tokens[:, step : step + 1], past_key_values=cache).logits for step in range(12, 16)]
    actual = torch.cat(pieces, dim=1)
    if kind == "quantised":
        assert (actual - expected).norm() < 0.3 * expected.norm()
    else:
        assert_close(actual, expected, **CLOSE)


def test_compiled_with_a_cache_of_its_own():
    """The layers are made and changed inside of the graph. One scheme: a compilation takes five seconds."""
    torch._dynamo.reset()
    model, tokens = make("pope+fox", True, num_hidden_layers=1), make_tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = compiled(tokens[:, :8], use_cache=True).past_key_values
        logits = model(tokens[:, 8:], past_key_values=cache).logits
        assert_close(logits, model(tokens).logits[:, 8:], **CLOSE)
        cache = DynamicCache(config=model.config)
        compiled(tokens[:, :8], past_key_values=cache)
        logits = compiled(tokens[:, 8:], past_key_values=cache).logits
        assert_close(logits, model(tokens).logits[:, 8:], **CLOSE)


@each_scheme
def test_assisted_decoding_and_beams(scheme):
    model, tokens = make(scheme), make_tokens(1, 9)
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    expected = model.generate(tokens, **options, use_cache=False)
    assert torch.equal(model.generate(tokens, **options, assistant_model=make_model(scheme)), expected)
    assert torch.equal(model.generate(tokens, **options, prompt_lookup_num_tokens=2), expected)
    expected = model.generate(tokens, **options, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(tokens, **options, num_beams=3), expected)


def test_quantised_numbers_are_exact():
    """Only keys and values are rounded: the numbers of 40 tokens are those of a plain cache."""
    pytest.importorskip("optimum.quanto", reason="keeps the quantised keys and values")
    model, tokens = make("fox", head_dim=16), make_tokens(2, 40)
    held = []
    with torch.no_grad():
        for cache in (DynamicCache(), QuantizedCache("quanto", model.config, q_group_size=16, residual_length=4)):
            model(tokens, past_key_values=cache)
            held.append(cache.layers[0].layers_beside[0].keys)
    assert held[0].dtype == torch.float32 and torch.equal(*held)


def test_an_unknown_kind_of_layer_is_refused():
    class Strange(CacheLayerMixin):
        lazy_initialization = update = get_mask_sizes = get_seq_length = get_max_length = lambda self, *args: 0

    cache, keys = DynamicCache(config=make_config("fox")), torch.zeros(1, 2, 3, 8)
    cache.layers[0] = Strange()
    with pytest.raises(ValueError, match="`cache` must have layers of transformers' static, dynamic.*got Strange"):
        add_with_beside(cache, keys, keys, [torch.zeros(1, 6, 3, 1)], 0)


def test_an_own_kind_of_layer_is_kept():
    class Own(DynamicLayer):
        pass

    model = make("fox")
    cache = DynamicCache(config=model.config)
    cache.layers = [Own() for _ in cache.layers]
    model(make_tokens(1, 4), past_key_values=cache)
    assert all(isinstance(layer, Own) and layer.keys.shape[2] == 4 for layer in cache.layers)


def test_a_saved_folder_carries_it(tmp_path):
    model = make("fox")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "cached_beside.py").is_file()
    assert isinstance(RelPosForCausalLM.from_pretrained(tmp_path), RelPosForCausalLM)
