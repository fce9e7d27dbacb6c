"""What must hold for every scheme: causality, caching, padding, packing, kernels, gradients, saving."""

import copy

import pytest
import torch
from conftest import SCHEMES, make_config, make_model, make_tokens, schemes_of
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
)

from hf_relpos import RelPosForCausalLM, RelPosForSequenceClassification, RelPosForTokenClassification, RelPosModel
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.model.scheme_registry import layer_groups


# fp32 logits of magnitude 1..10 computed by another order of operations
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
RELATIVE = [s for s in SCHEMES if all(POSITION_EMBEDDINGS[part].kind != "absolute" for part in schemes_of(s))]
# order and content alone matter: positions say where documents start, and nothing else
PLACELESS = ["none", "fox", "cope"]
# a window counts slots, padding among them
WITHOUT_WINDOWS = [s for s in SCHEMES if make_config(s).sliding_window is None]
ABSOLUTE = [s for s in SCHEMES if s not in RELATIVE]

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_kernel = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def assert_gradients_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Each gradient to 1e-5 of its own norm, fp32 summed in another order; where the terms of a sum cancel, to 1e-8 of
    the largest gradient."""
    assert first.keys() == second.keys()
    largest = max(gradient.norm() for gradient in first.values())
    for name in first:
        error = (first[name] - second[name]).norm()
        assert error < 1e-5 * first[name].norm() + 1e-8 * largest, f"{name}: error {error:.1e}"


def pad_left(tokens: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N) → (B, N + max) with `pads[b]` + its share of padding in front, each row with tokens of its own length."""
    width = tokens.shape[1] + max(pads)
    padded, mask = torch.zeros(len(tokens), width, dtype=torch.long), torch.zeros(len(tokens), width, dtype=torch.long)
    for row, pad in enumerate(pads):
        length = width - pad
        padded[row, pad:] = make_tokens(length, seed=100 + row)
        padded[row, -tokens.shape[1] :] = tokens[row]
        mask[row, pad:] = 1
    return padded, mask


@each_scheme
@each_kernel
def test_causality(scheme, implementation):
    model, tokens = make_model(scheme, attn_implementation=implementation), make_tokens(1, 21)
    changed = tokens.clone()
    changed[0, 11] = 3 if tokens[0, 11] != 3 else 4
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(-1).all()


def make_cache(kind: str, model: RelPosForCausalLM, length: int):
    return StaticCache(config=model.config, max_cache_len=length) if kind == "static" else DynamicCache()


@each_scheme
@each_kernel
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decoding_with_left_padding_is_the_unpadded_forward(scheme, implementation, cache):
    """Prefill, a chunk of three, then single steps; positions are left to the model."""
    model = make_model(scheme, attn_implementation=implementation)
    padded, mask = pad_left(make_tokens(3, 20), [0, 3, 8])
    width, prefill = padded.shape[1], padded.shape[1] - 9
    past = make_cache(cache, model, width + 5)
    pieces, start = [], 0
    for end in (prefill, prefill + 3, *range(prefill + 4, width + 1)):
        output = model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        pieces.append(output.logits)
        start = end
    logits = torch.cat(pieces, dim=1)
    for row, pad in enumerate((0, 3, 8)):
        expected = model(padded[row : row + 1, pad:]).logits[0]
        assert_close(logits[row, pad:], expected, **CLOSE)


def pad_between(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (3, n + 3) rows with three tokens of padding each, all of it before the last token, and their mask."""
    mask = torch.ones(3, tokens.shape[1] + 3, dtype=torch.long)
    mask[0, :3] = mask[1, 2:5] = mask[2, [0, 1, 4]] = 0
    return torch.zeros_like(mask).masked_scatter(mask.bool(), tokens), mask


@pytest.mark.parametrize(
    ("scheme", "padding"), [(each, "left") for each in SCHEMES] + [(each, "between") for each in WITHOUT_WINDOWS]
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_padding_is_greedy_decoding_by_hand(scheme, padding, cache):
    model = make_model(scheme)
    model.generation_config.eos_token_id = None
    tokens = make_tokens(3, 7)
    padded, mask = pad_left(tokens, [0, 2, 5]) if padding == "left" else pad_between(tokens)
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    output = model.generate(padded, attention_mask=mask, max_new_tokens=9, do_sample=False, **options)
    for row in range(3):
        prompt, generated = padded[row, mask[row].bool()], output.sequences[row, padded.shape[1] :]
        expected = model(torch.cat((prompt, generated))[None]).logits[0, len(prompt) - 1 : -1]
        assert_close(torch.stack([scores[row] for scores in output.scores]), expected, **CLOSE)
        assert generated.tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("scheme", WITHOUT_WINDOWS)
def test_a_ready_mask_with_gaps_beside_a_cache(scheme):
    """It does not say whether the hidden keys are padding, which positions skip, or tokens. Rotations need no
    positions of the keys."""
    model = make_model(scheme)
    tokens, mask = pad_between(make_tokens(3, 7))
    expected = model(tokens, attention_mask=mask).logits[:, -1]
    past = model(tokens[:, :9], attention_mask=mask[:, :9]).past_key_values
    step = dict(input_ids=tokens[:, 9:], position_ids=torch.full((3, 1), 6), past_key_values=past)
    if any(group.has_position_bias for group in layer_groups(model.config)):
        with pytest.raises(ValueError, match="^`attention_mask` of 4 dimensions beside a cache must hide no key"):
            model(**step, attention_mask=mask.bool()[:, None, None])
    else:
        assert_close(model(**step, attention_mask=mask.bool()[:, None, None]).logits[:, 0], expected, **CLOSE)


@each_scheme
def test_beam_search_with_and_without_the_cache(scheme):
    model = make_model(scheme)
    padded, mask = pad_left(make_tokens(2, 7), [0, 4])
    options = dict(attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(model.generate(padded, **options), model.generate(padded, use_cache=False, **options))


@each_scheme
@each_kernel
@pytest.mark.parametrize("mask", ["no mask", "full mask", "padded at the end"])
def test_packed_is_separate(scheme, implementation, mask):
    model, tokens = make_model(scheme, attn_implementation=implementation), make_tokens(2, 24)
    lengths = (5, 1, 11, 7)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    attention_mask = None if mask == "no mask" else torch.ones_like(tokens)
    real = 24
    if mask == "padded at the end":
        attention_mask[:, 20:], real = 0, 20
    packed = model(tokens, position_ids=position_ids, attention_mask=attention_mask)
    separate = torch.cat([model(piece).logits for piece in tokens.split(lengths, dim=1)], dim=1)
    assert_close(packed.logits[:, :real], separate[:, :real], **CLOSE)
    assert packed.past_key_values is None, "a packed row cannot be continued"


@each_scheme
def test_packed_rows_that_differ(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 12)
    cuts = ((5, 7), (9, 3))
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in cuts])
    packed = model(tokens, position_ids=position_ids).logits
    for row, lengths in enumerate(cuts):
        separate = [model(piece).logits[0] for piece in tokens[row : row + 1].split(lengths, dim=1)]
        assert_close(packed[row], torch.cat(separate), **CLOSE)


def test_packed_rows_refuse_a_cache():
    model, tokens = make_model("alibi"), make_tokens(1, 6)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    padded = torch.tensor([[1, 1, 1, 1, 1, 0]])
    filled = model(tokens, use_cache=True).past_key_values
    for mask, past in ((None, DynamicCache()), (padded, DynamicCache()), (None, filled)):
        with pytest.raises(ValueError, match="`cache` must be None for packed sequences"):
            model(tokens, position_ids=position_ids, attention_mask=mask, past_key_values=past)


@each_scheme
def test_gaps_in_positions_and_in_the_mask(scheme):
    """Positions may leave numbers out; a hole in the mask is no token and takes no position."""
    model, tokens = make_model(scheme), make_tokens(2, 9)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 0]])
    logits = model(tokens, attention_mask=mask).logits
    for row in range(2 if model.config.sliding_window is None else 0):  # a window counts slots, holes too
        kept = mask[row].bool()
        assert_close(logits[row, kept], model(tokens[row : row + 1, kept]).logits[0], **CLOSE)

    spread = torch.tensor([[0, 1, 5, 6, 40, 41, 60, 61, 62]])
    one_by_one, past = [], DynamicCache()
    for index in range(9):  # without a cache's help, from the dense definition: key positions are the given ones
        output = model(tokens[:1, : index + 1], position_ids=spread[:, : index + 1])
        one_by_one.append(output.logits[:, -1])
    whole = model(tokens[:1], position_ids=spread)
    assert_close(whole.logits[0], torch.cat(one_by_one), **CLOSE)
    if any(group.has_position_bias for group in layer_groups(model.config)):
        assert whole.past_key_values is None
        with pytest.raises(ValueError, match="`cache` must be None for .* positions that skip numbers"):
            model(tokens[:1], position_ids=spread, past_key_values=past)
    else:
        model(tokens[:1, :8], position_ids=spread[:, :8], past_key_values=past)
        step = model(tokens[:1, 8:], position_ids=spread[:, 8:], past_key_values=past).logits
        assert_close(step[0], whole.logits[0, 8:], **CLOSE)
    if scheme not in PLACELESS:
        assert not torch.allclose(torch.cat(one_by_one), model(tokens[:1]).logits[0], **CLOSE)


@each_scheme
def test_shared_prefix_by_a_4d_mask(scheme):
    """Two continuations of one prefix in one row, kept apart by the mask, with positions of their own."""
    model, tokens = make_model(scheme), make_tokens(1, 10)
    prefix, first, second = tokens[:, :4], tokens[:, 4:7], tokens[:, 7:]
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[7:, 4:7] = False
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]])
    if model.config.sliding_window:
        with pytest.raises(ValueError, match="`attention_mask` of 4 dimensions must be a dictionary"):
            model(tokens, attention_mask=mask[None, None])
        return
    logits = model(tokens, attention_mask=mask[None, None], position_ids=position_ids).logits
    assert_close(logits[:, 4:7], model(torch.cat((prefix, first), 1)).logits[:, 4:], **CLOSE)
    assert_close(logits[:, 7:], model(torch.cat((prefix, second), 1)).logits[:, 4:], **CLOSE)


@each_scheme
def test_eager_is_sdpa_with_gradients(scheme):
    tokens, results = make_tokens(2, 26), []
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    labels = tokens.clone()
    labels[0, :6] = -100  # no target for padding, nor for what padding would predict
    for implementation in ("eager", "sdpa"):
        model = make_model(scheme, attn_implementation=implementation, num_key_value_heads=2).train()
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_gradients_close(*results)


@each_scheme
def test_every_parameter_gets_a_gradient(scheme):
    model, tokens = make_model(scheme, train_length=80).train(), make_tokens(4, 160)
    model(tokens, labels=tokens).loss.backward()
    largest = max(parameter.grad.norm() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        # more than what rounding leaves of a gradient that is zero by algebra
        assert parameter.grad.isfinite().all() and parameter.grad.norm() > 1e-5 * largest, name
        if "position_embeddings" in name and parameter.ndim > 1:
            rows = parameter.grad.any(-1).float().mean().item()
            # of hidden units with random weights and biases that see inputs from 0 to 1, three in eight stay at 0
            assert rows > 0.4, f"{name}: only {rows:.0%} of its rows learn"


@pytest.mark.parametrize("scheme", RELATIVE)
@each_kernel
def test_a_shift_of_positions_changes_nothing_for_relative_schemes(scheme, implementation):
    model, tokens = make_model(scheme, attn_implementation=implementation), make_tokens(2, 20)
    shifted = torch.arange(20)[None] + 70
    # rotary computes its angles in fp32 from the absolute positions
    assert_close(model(tokens, position_ids=shifted).logits, model(tokens).logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("scheme", ABSOLUTE)
def test_a_shift_of_positions_matters_to_absolute_schemes(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 20)
    shifted = torch.arange(20)[None] + 70
    assert (model(tokens, position_ids=shifted).logits - model(tokens).logits).abs().max() > 1e-2


@each_scheme
def test_order_matters_to_all_but_none(scheme):
    """Swapping two earlier tokens moves the last logits: one layer of NoPE cannot see it, at any temperature."""
    model, tokens = make_model(scheme, num_hidden_layers=scheme.count("/") + 1), make_tokens(1, 12)
    swapped = tokens.clone()
    swapped[0, 2], swapped[0, 7] = tokens[0, 7], tokens[0, 2]
    moved = (model(tokens).logits - model(swapped).logits)[0, -1].abs().max()
    # nor by an absolute scheme that acts on queries and keys: a factor of the queries tells no two keys apart
    classes = [POSITION_EMBEDDINGS[name] for name in schemes_of(scheme)]
    is_blind = all(cls.hooks <= {"rotation", "rotate"} and cls.kind != "relative" for cls in classes)
    assert (moved < 1e-4) if is_blind else (moved > 1e-3)


@each_scheme
def test_three_times_the_training_length(scheme):
    model, tokens = make_model(scheme), make_tokens(1, 3 * 160)
    if "learned" in scheme:
        with pytest.raises(ValueError, match="`max_position_embeddings`=160: .* 0 to 159, got 479"):
            model(tokens)
        with pytest.raises(ValueError, match="`max_position_embeddings`=160"):
            model.generate(tokens[:, :158], max_new_tokens=5, min_new_tokens=5)
    else:
        assert model(tokens).logits.isfinite().all()


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_save_and_load_with_poisoned_memory(scheme, dtype, tmp_path, poisoned_memory):
    model, tokens = make_model(scheme).to(dtype), make_tokens(2, 15)
    model.save_pretrained(tmp_path)
    for auto, reference in ((AutoModelForCausalLM, model), (AutoModel, model.model)):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        assert type(loaded) is type(reference) and loaded.dtype == dtype
        assert torch.equal(loaded(tokens)[0], reference(tokens)[0])


@each_scheme
@each_kernel
def test_bf16(scheme, implementation):
    """Close to fp32, with gradients; what is fixed (slopes, angles, sinusoids) is not rounded with the weights."""
    model, tokens = make_model(scheme, attn_implementation=implementation, initializer_range=0.05), make_tokens(2, 60)
    expected = model(tokens).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    output = half(tokens, labels=tokens)
    assert output.logits.dtype == torch.bfloat16
    # 8 bits of mantissa through two layers; a position scheme that broke in bf16 is off by the logits' own size
    assert (output.logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())
    if scheme == "alibi":
        assert torch.equal(half.model.distance_bias(3000), model.model.distance_bias(3000))


@each_scheme
def test_autocast_leaves_the_bias_in_fp32(scheme):
    model = make_model(scheme)
    if any(group.has_position_bias for group in layer_groups(model.config)):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.model.distance_bias(999), make_model(scheme).model.distance_bias(999))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(make_tokens(1, 9)).logits.isfinite().all()


@each_scheme
@each_kernel
def test_grouped_query_attention_is_repeated_heads(scheme, implementation):
    grouped = make_model(scheme, num_key_value_heads=2, attn_implementation=implementation)
    full = make_model(scheme, attn_implementation=implementation)
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 8, 48).repeat_interleave(3, dim=0).reshape(48, 48)
    full.load_state_dict(state)
    padded, mask = pad_left(make_tokens(2, 9), [0, 4])
    assert_close(
        grouped(padded, attention_mask=mask).logits[:, 4:], full(padded, attention_mask=mask).logits[:, 4:], **CLOSE
    )


@each_scheme
def test_inputs_embeds(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 13)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=5, do_sample=False)[:, 13:])
    for wrong in ({}, {"input_ids": tokens, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**wrong)


@each_scheme
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(scheme, reentrant):
    tokens, gradients = make_tokens(2, 14), []
    for checkpointed in (False, True):
        model = make_model(scheme, hidden_dropout=0.2).train()
        if checkpointed:
            # renamed in transformers 5.23
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_gradients_close(*gradients)


# schemes for each way to attend, and the rows that they are compiled with: a graph of a layer takes seconds
COMPILED = {"linear_cpb": "whole padded packed", "fire": "padded packed", "fox": "padded packed"}
COMPILED |= {"dape": "padded packed", "rotary": "padded packed"}


@pytest.mark.parametrize("scheme, rows", COMPILED.items())
def test_compiles_without_graph_breaks(scheme, rows):
    torch._dynamo.reset()
    num_layers = 2 if scheme == "linear_cpb" else 1  # layers share what they attend by
    model, tokens = make_model(scheme, num_hidden_layers=num_layers), make_tokens(2, 17)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    padded, mask = pad_left(tokens, [0, 4])
    with torch.no_grad():
        if "whole" in rows:
            assert_close(compiled(tokens).logits, model(tokens).logits, **CLOSE)
        if "padded" in rows:
            expected = model(padded, attention_mask=mask).logits
            assert_close(compiled(padded, attention_mask=mask).logits[1, 4:], expected[1, 4:], **CLOSE)
        if "packed" in rows:
            positions = {"position_ids": torch.cat((torch.arange(6), torch.arange(11)))[None].expand(2, -1)}
            assert_close(compiled(tokens, **positions).logits, model(tokens, **positions).logits, **CLOSE)
    if any(group.has_position_bias for group in layer_groups(model.config)):
        with pytest.raises(RuntimeError, match="gaps cannot be compiled"):
            compiled(tokens, position_ids=torch.arange(17)[None] * 9)


# --- position-start augmentation


@each_scheme
def test_position_start_augmentation(scheme):
    """In training only; matters to absolute schemes only; draws every start and no position past the table."""
    model, plain = make_model(scheme, position_start_augmentation=True, max_position_embeddings=24), make_model(scheme)
    plain = make_model(scheme, max_position_embeddings=24)
    tokens = make_tokens(3, 20)
    assert torch.equal(model(tokens).logits, plain(tokens).logits), "evaluation starts at 0"
    seen = []
    for position_embedding in model.model.position_embeddings.values():
        embed = position_embedding.embed
        position_embedding.embed = lambda x, positions, embed=embed: seen.append(positions) or embed(x, positions)
    model.train()
    differ = 0.0
    for _ in range(30):
        output = model(tokens, use_cache=False)
        differ = max(differ, (output.logits - plain(tokens).logits).abs().max().item())
        output.logits.sum().backward()
    assert (differ > 1e-2) if scheme in ABSOLUTE else (differ < 2e-4)
    if seen:
        positions = torch.stack(seen)
        assert (positions.diff(dim=-1) == 1).all()
        assert set(positions[..., 0].flatten().tolist()) == {0, 1, 2, 3, 4}


def test_position_start_augmentation_of_packed_documents():
    """Each document has a start of its own, and attention still keeps to documents."""
    model = make_model("alibi", position_start_augmentation=True).train()
    tokens, position_ids = make_tokens(1, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    assert_close(
        model(tokens, position_ids=position_ids).logits, model.eval()(tokens, position_ids=position_ids).logits
    )


def test_position_start_augmentation_returns_no_cache():
    """Later tokens would stand at other positions than those that were drawn."""
    model = make_model("learned", position_start_augmentation=True)
    assert model.train()(make_tokens(1, 9)).past_key_values is None
    assert model.eval()(make_tokens(1, 9)).past_key_values.get_seq_length() == 9


def test_position_start_augmentation_refuses_long_sequences():
    model = make_model("none", position_start_augmentation=True, max_position_embeddings=8).train()
    with pytest.raises(ValueError, match="at most `max_position_embeddings`=8 tokens, got 9"):
        model(make_tokens(1, 9))


# --- heads, Auto classes, kernels that would drop a bias


@each_scheme
def test_classification_heads(scheme):
    config = make_config(scheme, num_labels=3)
    tokens, mask = pad_left(make_tokens(2, 9), [0, 4])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert type(model) is RelPosForSequenceClassification
    output = model(tokens, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3) and output.loss.isfinite()
    alone = model(tokens[1:, 4:]).logits
    right = torch.cat((tokens[1:, 4:], torch.zeros(1, 4, dtype=torch.long)), dim=1)
    assert_close(output.logits[1:], alone, **CLOSE)
    assert_close(model(right, attention_mask=(right != 0).long()).logits, alone, **CLOSE)

    model = AutoModelForTokenClassification.from_config(config).eval()
    assert type(model) is RelPosForTokenClassification
    output = model(tokens, attention_mask=mask, labels=torch.ones_like(tokens))
    assert output.logits.shape == (2, 13, 3)
    output.loss.backward()


def test_auto_classes():
    assert type(AutoModel.from_config(make_config("alibi"))) is RelPosModel
    assert type(AutoModelForCausalLM.from_config(make_config("alibi"))) is RelPosForCausalLM


def test_tied_embeddings_are_one_matrix(tmp_path):
    model = make_model("linear_cpb", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_outputs_on_request():
    model, tokens = make_model("linear_cpb", attn_implementation="eager"), make_tokens(2, 7)
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert_close(output.attentions[0].sum(-1), torch.ones(2, 6, 7))
    assert torch.equal(model(tokens, logits_to_keep=2).logits, output.logits[:, -2:])


def test_loss_is_the_shifted_mean_and_takes_the_items_of_the_whole_batch():
    model, tokens = make_model("none"), make_tokens(2, 7)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    assert_close(model(tokens, labels=tokens).loss, total / 12)
    assert_close(model(tokens, labels=tokens, num_items_in_batch=48).loss, total / 48)
