"""Positions drawn in training: which numbers come out, and that every scheme sees them."""

import json
from collections import Counter
from itertools import combinations

import pytest
import torch
from conftest import SCHEMES, make_model, make_tokens
from torch.testing import assert_close

from hf_relpos import RelPosConfig
from hf_relpos.model.position_augmentation import sample_positions
from hf_relpos.results.groups import VARIED
from hf_relpos.training.model_setup import ModelArguments, new_config


KINDS = pytest.mark.parametrize("sampling", ["randomized", "pose"])


def draw(sampling: str, rows: int, length: int, longest: int, mask=None, documents=None) -> torch.Tensor:
    torch.manual_seed(0)
    return sample_positions(sampling, torch.arange(length)[None], mask, documents, rows, longest)


def test_randomized_positions_are_all_sets_equally_often():
    rows = draw("randomized", 30_000, 3, 6)
    assert (rows.diff(dim=-1) > 0).all() and rows.min() == 0 and rows.max() == 5
    counts = Counter(map(tuple, rows.tolist()))
    assert set(counts) == set(combinations(range(6), 3))
    # 20 sets: chi squared with 19 degrees of freedom lies below 50 but for once in 7000
    assert sum((count - 1500) ** 2 / 1500 for count in counts.values()) < 50


def test_pose_cuts_once_and_skips_uniformly():
    length, longest = 7, 12
    rows = draw("pose", 40_000, length, longest)
    assert (rows[:, 0] == 0).all() and rows.max() == longest - 1
    steps = rows.diff(dim=-1)
    assert (steps >= 1).all() and ((steps > 1).sum(-1) <= 1).all()
    skips = Counter((rows[:, -1] - (length - 1)).tolist())
    assert set(skips) == set(range(6)) and all(abs(count / 40_000 - 1 / 6) < 0.01 for count in skips.values())
    skipped = steps[(steps > 1).any(-1)]
    firsts = Counter((skipped.argmax(-1) + 1).tolist())  # tokens of the first part, half of the row at most
    assert set(firsts) == {1, 2, 3, 4} and all(abs(count / len(skipped) - 1 / 4) < 0.01 for count in firsts.values())


@KINDS
def test_documents_and_padding(sampling):
    """Each document draws for itself over the whole range; padding keeps its positions and takes none."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]]).expand(5000, -1)
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    rows = draw(sampling, 5000, 9, 20, mask, documents)
    assert torch.equal(rows[:, [0, 1, 8]], torch.tensor([[0, 1, 8]]).expand(5000, -1))
    for part in (rows[:, 2:6], rows[:, 6:8]):
        assert (part.diff(dim=-1) > 0).all() and part.min() == 0 and part.max() == 19
        assert len(set(part[:, -1].tolist())) >= 16, "not the end of a longer document's numbers"
    if sampling == "randomized":  # the mean of the i-th of n draws from 0..19 is (i + 1) · 21 / (n + 1) − 1
        assert_close(rows[:, 2:6].double().mean(0), torch.arange(1, 5).double() * 21 / 5 - 1, rtol=0, atol=0.25)


@KINDS
def test_a_single_token_and_a_full_row(sampling):
    assert draw(sampling, 50, 1, 4).max() < 4
    assert torch.equal(draw(sampling, 2, 6, 6), torch.arange(6).expand(2, -1))


BY_CONTENT = ("none", "fox", "cope")  # the tokens in between, and not how far their positions are


@KINDS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_sees_the_positions(scheme, implementation, sampling):
    """In training the logits are those of the drawn positions; in evaluation those of 0..N−1."""
    model = make_model(scheme, position_sampling=sampling, attn_implementation=implementation)
    plain = make_model(scheme, attn_implementation=implementation)
    tokens = make_tokens(2, 20)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    torch.manual_seed(5)
    expected_positions = sample_positions(sampling, torch.arange(20)[None], None, None, 2, 160)
    assert expected_positions.max() > 50
    torch.manual_seed(5)
    output = model.train()(tokens)
    assert output.past_key_values is None, "nothing can go on after positions with gaps"
    assert_close(output.logits, plain(tokens, position_ids=expected_positions).logits, rtol=1e-5, atol=2e-5)
    moved = (output.logits - plain(tokens).logits).abs().max()
    assert moved < 1e-5 if scheme in BY_CONTENT else moved > 1e-3  # kernels round in their own ways
    output.logits.sum().backward()


@KINDS
def test_packed_and_padded_rows(sampling):
    """Attention keeps to documents, whose positions are drawn apart."""
    model = make_model("rotary+log_cpb", position_sampling=sampling).train()
    tokens, position_ids = make_tokens(2, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    torch.manual_seed(1)
    whole = model(tokens, position_ids=position_ids).logits
    documents = torch.tensor([[0] * 5 + [1] * 7])
    torch.manual_seed(1)
    drawn = sample_positions(sampling, position_ids, None, documents, 2, 160)
    for part in (slice(0, 5), slice(5, 12)):
        alone = model.eval()(tokens[:, part], position_ids=drawn[:, part]).logits
        assert_close(whole[:, part], alone, rtol=1e-4, atol=2e-5)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    torch.manual_seed(1)
    logits = model.train()(tokens, attention_mask=mask).logits
    torch.manual_seed(1)
    drawn = sample_positions(sampling, torch.arange(12)[None], mask, None, 2, 160)
    alone = model.eval()(tokens[1:, 4:], position_ids=drawn[1:, 4:]).logits
    assert_close(logits[1:, 4:], alone, rtol=1e-4, atol=2e-5)


def test_sampled_positions_compile():
    torch._dynamo.reset()
    model = make_model("alibi", position_sampling="randomized", max_position_embeddings=64).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = make_tokens(2, 11)
    loss = compiled(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert loss.isfinite()


def test_position_sampling_refuses():
    with pytest.raises(ValueError, match=r"`position_sampling` must be None or one of \['randomized', 'pose'\], got 3"):
        RelPosConfig(position_sampling=3)
    with pytest.raises(ValueError, match="`position_sampling` must be None with `position_start_augmentation`"):
        RelPosConfig(position_sampling="pose", position_start_augmentation=True)
    model = make_model("none", position_sampling="pose", max_position_embeddings=8).train()
    with pytest.raises(ValueError, match="`position_sampling` .* at most `max_position_embeddings`=8 tokens, got 9"):
        model(make_tokens(1, 9))
    with pytest.raises(ValueError, match="`attention_mask` must have 2 dimensions"):
        model(make_tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())


def test_flags_of_position_sampling():
    config = new_config(ModelArguments(pos_embedding_type="learned", position_sampling="randomized"), 128)
    assert config.position_sampling == "randomized" and config.max_position_embeddings == 2048
    assert new_config(ModelArguments(position_sampling="none"), 128).position_sampling is None
    assert json.loads(config.to_json_string())["position_sampling"] == "randomized"
    assert VARIED["position_sampling"]("pose") == "pose positions" and VARIED["position_sampling"](None) == ""
