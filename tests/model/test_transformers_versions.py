"""The names that transformers 5.24 changed, under whichever version is installed."""

import inspect
import warnings

import pytest
import torch
from conftest import make_model, make_tokens
from transformers import DynamicCache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from hf_relpos.model.transformers_versions import CACHE_NAME, CACHE_NAMES, FORWARD_KEYWORDS, takes_cache


@pytest.fixture(scope="module", params=["rotary", "linear_cpb", "fox"])
def model(request):
    return make_model(request.param)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_has_two_names(model, name):
    tokens, expected = make_tokens(2, 12), model(make_tokens(2, 12)).logits[:, 7:]
    for part in (model, model.model):
        outputs = part(tokens[:, :7], use_cache=True)
        assert outputs[name] is getattr(outputs, name) and outputs[name].get_seq_length() == 7
    outputs = model(tokens[:, :7], use_cache=True)
    torch.testing.assert_close(model(tokens[:, 7:], **{name: outputs[name]}).logits, expected, rtol=1e-4, atol=1e-4)
    outputs = model(tokens[:, :7], use_cache=True, **{name: DynamicCache(config=model.config)})
    assert outputs[name].get_seq_length() == 7


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_takes_both_names(model, name):
    tokens, options = make_tokens(2, 9), {"max_new_tokens": 6, "do_sample": False}
    cache = model(tokens[:, :5], use_cache=True)[name]
    assert torch.equal(model.generate(tokens, **{name: cache}, **options), model.generate(tokens, **options))
    assert cache.get_seq_length() == 14


def test_both_names_at_once_are_refused(model):
    caches = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument, got both"):
        model(make_tokens(1, 4), **caches)
    assert model(make_tokens(1, 4), **{**caches, CACHE_NAMES[1]: None}).logits.shape[1] == 4


def test_the_old_name_warns_where_transformers_has_the_new_one(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in CACHE_NAMES:
            model(make_tokens(1, 4), **{name: DynamicCache(config=model.config)})
    told = [str(warning.message) for warning in caught if warning.category is FutureWarning]
    expected = ["`past_key_values` is deprecated. Use `cache` instead."] if CACHE_NAME == CACHE_NAMES[0] else []
    assert told == expected


def test_the_signature_has_the_name_of_the_installed_version(model):
    for part in (model, model.model, model.model.layers[0]):
        assert [name for name in CACHE_NAMES if name in inspect.signature(part.forward).parameters] == [CACHE_NAME]


@pytest.mark.parametrize(("ours", "theirs"), [CACHE_NAMES, CACHE_NAMES[::-1]])
def test_a_method_of_either_version_takes_both_names(ours, theirs):
    scope: dict = {}
    exec(f"def method(self, x, {ours}=None, y=2):\n    return x, {ours}, y", scope)
    method = takes_cache(scope["method"])
    assert method(None, 1, **{theirs: "keys"}) == method(None, 1, **{ours: "keys"}) == method(None, 1, "keys")


PACKED = torch.tensor([[0, 1, 0, 1, 2]])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"atention_mask": torch.ones(1, 5)}, "unexpected keyword argument 'atention_mask'"),
        ({"past_key_value": DynamicCache()}, "unexpected keyword argument 'past_key_value'"),
        ({"token_type_ids": torch.ones(1, 5)}, "unexpected keyword argument 'token_type_ids'"),
        ({"position_id": [[0, 1, 2, 3, 4]]}, "unexpected keyword argument 'position_id'"),
        ({"is_causal": False}, "`is_causal` must be True or None"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "`position_ids` must be given with `cu_seq_lens_q`"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}, "`position_ids` must be given with `seq_idx`"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "position_ids": torch.arange(5)[None]},
            "`cu_seq_lens_q` must agree",
        ),
        ({"cu_seq_lens_k": torch.tensor([0, 5]), "position_ids": PACKED}, "`cu_seq_lens_k` must agree"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "position_ids": PACKED}, "`cu_seq_lens_q` must agree"),
        ({"seq_idx": torch.zeros(1, 5, dtype=torch.int32), "position_ids": PACKED}, "`seq_idx` must agree"),
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_keywords_that_would_be_lost_are_refused(keywords, message, implementation):
    model = make_model("alibi")
    model.set_attn_implementation(implementation)
    with pytest.raises((TypeError, ValueError), match=message):
        model(make_tokens(1, 5), **keywords)


def test_packing_that_agrees_with_the_positions():
    model, tokens = make_model("alibi"), make_tokens(1, 5)
    expected = model(tokens, position_ids=PACKED).logits
    bounds, index = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([[3, 3, 4, 4, 4]])
    for packing in ({"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 3}, {"seq_idx": index}):
        assert torch.equal(model(tokens, position_ids=PACKED, **packing).logits, expected)
    twice = torch.tensor([0, 2, 5, 7, 10], dtype=torch.int32)
    rows = model(tokens.expand(2, -1), position_ids=PACKED, cu_seq_lens_q=twice).logits
    torch.testing.assert_close(rows, expected.expand(2, -1, -1))


def test_other_keywords_are_none_of_ours():
    assert FORWARD_KEYWORDS >= {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    model, tokens = make_model("alibi"), make_tokens(1, 5)
    assert torch.equal(model(tokens, tokenizer="any", num_items_in_batch=torch.tensor(5)).logits, model(tokens).logits)


def test_a_loss_of_the_users_gets_its_keywords():
    model, tokens = make_model("alibi"), make_tokens(1, 5)
    model.loss_function = lambda logits, labels, vocab_size, token_weights: (logits.sum(-1) * token_weights).sum()
    loss = model(tokens, labels=tokens, token_weights=torch.ones(1, 5)).loss
    torch.testing.assert_close(loss, model(tokens).logits.sum())
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_weight'"):
        model(tokens, labels=tokens, token_weight=torch.ones(1, 5))


def test_the_position_in_the_cache_may_be_given():
    """Versions before 5 passed it, and clients of theirs do; the cache knows it."""
    model, tokens = make_model("alibi"), make_tokens(1, 5)
    assert torch.equal(model(tokens, cache_position=torch.arange(5)).logits, model(tokens).logits)
