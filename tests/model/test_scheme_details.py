"""What single schemes promise beyond their formulas: bounds of parameters, edges of buckets, positions served."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import make_config, make_model, make_tokens
from transformers.models.t5.modeling_t5 import T5Attention

from hf_relpos import RelPosConfig
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


@pytest.mark.parametrize("scheme, largest", [("kerple_log", 9.0), ("kerple_power", 2.0)])
def test_kerple_parameters_out_of_range_act_as_the_bound_and_find_back(scheme, largest):
    kerple = POSITION_EMBEDDINGS[scheme](make_config(scheme))
    distance = torch.arange(50)

    def set_parameters(p, a):
        with torch.no_grad():
            kerple.p.copy_(torch.tensor(p)), kerple.a.copy_(torch.tensor(a))

    set_parameters([0.01, 0.01, 2.0, 1.0, largest, largest], [1.0, 0.01, 0.5, 0.01, 1.0, 0.01])
    expected = kerple.distance_bias(distance)
    outside = 9.0 if scheme == "kerple_power" else largest
    set_parameters([-3.0, 0.009, 2.0, 1.0, outside, outside], [1.0, -1.0, 0.5, 0.0, 1.0, -5.0])
    assert torch.equal(kerple.distance_bias(distance), expected)
    # a step against the gradient moves the bias up or down: what lies outside may come back, and goes no further out
    for sign, low_moves in ((1, True), (-1, False)):
        kerple.zero_grad()
        (sign * kerple.distance_bias(distance)).sum().backward()
        assert (kerple.p.grad[:2] != 0).all() == low_moves and (kerple.a.grad[[1, 3, 5]] != 0).all() == low_moves
        assert (kerple.p.grad[2:4] != 0).all() and (kerple.a.grad[[0, 2, 4]] != 0).all()
        assert (kerple.p.grad[4:] != 0).all() == (scheme == "kerple_log" or not low_moves)


def test_pope_phases_out_of_range_act_as_the_bound_and_find_back():
    """They begin at their upper bound: after `torch.clamp` those that the first step raises would never learn again."""
    pope = POSITION_EMBEDDINGS["pope"](make_config("pope"))
    positions = torch.zeros(1, 1, dtype=torch.long)  # where the sine of the query is that of -phase
    with torch.no_grad():
        pope.phase.zero_()
        expected = pope.rotation(positions, torch.float32)
        pope.phase[0], pope.phase[1] = 0.5, -2 * math.pi - 0.5
    for actual, value in zip(pope.rotation(positions, torch.float32), expected):
        assert torch.allclose(actual, value, atol=1e-6)
    for sign, raises in ((1, True), (-1, False)):  # a step against the gradient raises the phases, or lowers them
        pope.zero_grad()
        (sign * pope.rotation(positions, torch.float32)[1]).sum().backward()
        assert (pope.phase.grad[0] != 0).all() != raises and (pope.phase.grad[1] != 0).all() == raises
        assert (pope.phase.grad[2:] == -sign).all()


def buckets(distance: torch.Tensor, num_buckets: int, max_distance: int) -> list[int]:
    t5 = POSITION_EMBEDDINGS["t5"](make_config("t5"), num_buckets, max_distance)
    with torch.no_grad():
        t5.weight.copy_(torch.arange(num_buckets)[:, None])
    return t5.distance_bias(distance)[0].long().tolist()


def test_t5_buckets_are_transformers():
    distance = torch.arange(4097)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert buckets(distance, 32, 128) == theirs.tolist()


@pytest.mark.parametrize("options", [(32, 128), (32, 64), (32, 20), (16, 4096), (20, 160), (7, 50), (2, 9), (64, 1000)])
def test_t5_buckets_are_exact_at_their_edges(options):
    """Compared in fractions: (d/E)^(N − E) against (M/E)^k. In fp32, 27 of (32, 64) and others fall a bucket short."""
    (num_buckets, longest), distances = options, [*range(300), *range(900, 1100), *range(4000, 4200)]
    exact = num_buckets // 2
    wide = num_buckets - exact
    edges = [Fraction(longest, exact) ** k for k in range(1, wide)]
    expected = [
        d if d < exact else exact + sum(Fraction(d, exact) ** wide >= edge for edge in edges) for d in distances
    ]
    assert buckets(torch.tensor(distances), *options) == expected


def test_xpos_is_served_as_far_as_its_factors_fit_the_dtype():
    """At the first and the last position, in each dtype: what it gives elsewhere, and gradients."""
    options = {"pos_embedding_kwargs": {"scale_base": 32}, "max_position_embeddings": 1100}
    model, tokens = make_model("xpos", initializer_range=0.05, **options), make_tokens(2, 24)
    expected = model(tokens, position_ids=torch.arange(24)[None] + 540).logits
    # fp32 angles near 1700 are off by 1e-4; the other dtypes have 8 and 11 bits
    for dtype, reach, tolerance in (
        (torch.float32, 1133, 1e-3),
        (torch.bfloat16, 1133, 0.05),
        (torch.float16, 141, 0.01),
    ):
        model = make_model("xpos", initializer_range=0.05, **options).to(dtype)
        for first in (max(0, 550 - reach), 550 + reach - 23):
            output = model(tokens, position_ids=torch.arange(24)[None] + first, labels=tokens)
            assert (output.logits.float() - expected).abs().max() < tolerance * expected.abs().max()
            output.loss.backward()
            for parameter in model.parameters():
                assert parameter.grad.isfinite().all() and parameter.grad.any()
            model.zero_grad()
        message = f"`scale_base` 32 lets xpos serve positions {max(0, 550 - reach)} to {550 + reach} in {dtype}, got"
        with pytest.raises(ValueError, match=f"{message} {550 + reach + 1}"):
            model(tokens, position_ids=torch.arange(24)[None] + 550 + reach - 22)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="550.*in torch.float16, got 1000|in torch"),
    ):
        make_model("xpos", **options)(tokens[:, :1], position_ids=torch.tensor([[1000]]))


def test_temperature_acts_past_the_training_length_alone():
    model, plain, tokens = make_model("temperature", train_length=10), make_model("none"), make_tokens(2, 20)
    logits, expected = model(tokens).logits, plain(tokens).logits
    assert torch.equal(logits[:, :10], expected[:, :10])
    assert (logits[:, 10:] != expected[:, 10:]).any(-1).all()
    stronger = make_model("temperature", train_length=10, pos_embedding_kwargs={"beta": 0.5})(tokens).logits
    assert (stronger - expected).abs().max() > 2 * (logits - expected).abs().max()
    model.config.train_length = 20  # as finetuning does
    assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(ValueError, match="`train_length` must be set for pos_embedding_type 'temperature', got None"):
        RelPosConfig(pos_embedding_type="rotary+temperature")
