"""Schemes against x-transformers, whose code was written apart from ours. Skipped where it is not installed."""

import pytest
import torch
from conftest import make_config
from torch.testing import assert_close

from hf_relpos import Positions
from hf_relpos.model.attention_key_bias import dense_key_bias
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


theirs = pytest.importorskip("x_transformers.x_transformers")


def make_scheme(name: str, **overrides):
    config = make_config(name, **overrides)
    return POSITION_EMBEDDINGS[name](config, **config.pos_embedding_kwargs)


def by_distance(bias: torch.Tensor) -> torch.Tensor:
    """(H, N, N) → (H, N): the last query's, from itself on back."""
    return bias[:, -1].flip(-1)


def test_t5():
    ours = make_scheme("t5", pos_embedding_kwargs={"num_buckets": 20, "max_distance": 90})
    reference = theirs.RelativePositionBias(scale=1.0, causal=True, num_buckets=20, max_distance=90, heads=6)
    reference.relative_attention_bias.weight = ours.weight
    assert_close(ours.distance_bias(torch.arange(200)), by_distance(reference(200, 200)), rtol=0, atol=0)


@pytest.mark.parametrize("num_heads", [6, 8])
def test_alibi(num_heads):
    ours = make_scheme("alibi", num_attention_heads=num_heads)
    reference = theirs.AlibiPositionalBias(heads=num_heads)(200, 200)
    assert_close(ours.distance_bias(torch.arange(200)), by_distance(reference), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rotary", "xpos"])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_rotations(name, factor):
    """The scores of all pairs. They rotate neighbouring channels, ours channels half a rotation apart; their xPos keeps
    its factors near 1 about the middle of the sequence, ours about one position, which takes no part in the scores."""
    options = {"pos_embedding_kwargs": {"scale_base": 64}} if name == "xpos" else {}
    ours = make_scheme(name, head_dim=16, rope_parameters={"partial_rotary_factor": factor}, **options)
    query, key = torch.randn(2, 1, 3, 100, 16, generator=torch.Generator().manual_seed(0))
    turned = ours.rotate(query, key, ours.rotation(torch.arange(100)[None], torch.float32))

    size = int(16 * factor)
    reference = theirs.RotaryEmbedding(size, use_xpos=name == "xpos", scale_base=64)
    angles, scale = reference.forward_from_seq_len(100)
    neighbours = torch.cat((torch.arange(size).view(2, -1).T.flatten(), torch.arange(size, 16)))
    expected = [
        theirs.apply_rotary_pos_emb(x[..., neighbours], angles, scale**power) for x, power in ((query, 1), (key, -1))
    ]
    # scores of magnitude 1 to 10 from angles of up to 100 in fp32
    assert_close(turned[0] @ turned[1].mT, expected[0] @ expected[1].mT, rtol=1e-4, atol=1e-4)


def test_fox():
    """Their gates start at another bias, which both have here."""
    ours = make_scheme("fox")
    reference = theirs.DataDependentAlibi(48, heads=6, bias_init=5.0)
    torch.nn.init.constant_(ours.gate_bias, 5.0)
    reference.to_forget_gates[0].weight = ours.weight
    x = torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(1, 1, 50, 50, dtype=torch.bool).tril()
    expected = reference(x).where(visible, 0.0)
    assert_close(dense_key_bias(ours.key_bias(x), visible).where(visible, 0.0), expected, rtol=1e-4, atol=1e-5)


def test_cope():
    """Their causal mask is in the scores, ours beside them."""
    ours = make_scheme("cope", pos_embedding_kwargs={"max_position": 20})
    reference = theirs.CoPE(dim=8, heads=6, max_pos=20)
    torch.nn.init.normal_(ours.weight)
    reference.pos_emb = ours.weight
    query, key = torch.randn(2, 2, 6, 50, 8, generator=torch.Generator().manual_seed(0))
    scores, visible = query @ key.mT, torch.ones(1, 1, 50, 50, dtype=torch.bool).tril()
    positions = Positions(torch.arange(50)[None], torch.arange(50)[None], None, visible)
    expected = reference(query, scores.masked_fill(~visible, -torch.inf))
    actual = ours.score_bias(scores, None, query, positions)
    assert_close(actual.where(visible, 0.0), expected.where(visible, 0.0), rtol=1e-4, atol=1e-4)
