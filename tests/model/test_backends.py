"""Who computes the attention: every kernel that serves a scheme agrees with the reference, all others are refused."""

import ast
import inspect
import math
import os
import subprocess
import textwrap
from itertools import chain

import forked
import pytest
import torch
from conftest import ROOT, make_config, make_model, make_tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_relpos import RelPosForCausalLM, list_position_embeddings
from hf_relpos.model.decoder_layer import RelPosAttention


CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 logits of magnitude 1..10, summed in another order
KINDS = ["none", "learned", "alibi", "linear_cpb", "fire", "fox", "cope", "dape", "rotary"]
BIASED = [scheme for scheme in list_position_embeddings() if make_config(scheme).has_position_bias]
UNBIASED = [scheme for scheme in list_position_embeddings() if scheme not in BIASED]


def test_who_has_a_bias():
    assert {"linear_cpb", "alibi", "fire", "fox", "cope"} < set(BIASED)
    assert {"none", "learned", "sinusoidal", "rotary", "xpos", "temperature"} <= set(UNBIASED)


# --- flex attention


@pytest.fixture
def interpreted_flex(monkeypatch):
    """FlexAttention without the compiler, whose code for CPUs fails with shapes that change (Llama's too)."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training=False, **kwargs: torch.nn.attention.flex_attention.flex_attention(*args, **kwargs),
    )
    create = torch.nn.attention.flex_attention.create_block_mask
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask", lambda *args, _compile, **kwargs: create(*args, **kwargs)
    )


@pytest.mark.parametrize("scheme", KINDS)
def test_flex_attention_is_eager(scheme, interpreted_flex):
    """Rows that differ in padding or in documents, masks of four dimensions, grouped heads, a cache."""
    options = {"num_key_value_heads": 3, "head_dim": 16}
    eager = make_model(scheme, attn_implementation="eager", **options)
    flex = make_model(scheme, attn_implementation="flex_attention", **options)
    tokens, mask = make_tokens(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    real = mask.bool()
    with torch.no_grad():
        expected = eager(tokens, attention_mask=mask).logits
        assert_close(flex(tokens, attention_mask=mask).logits[real], expected[real], **CLOSE)
        cuts = ((21,), (6, 15), (9, 4, 8))
        packed = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in cuts])
        expected = eager(tokens, position_ids=packed).logits
        assert_close(flex(tokens, position_ids=packed).logits, expected, **CLOSE)
        past = flex(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
        step = flex(tokens[:, 20:], attention_mask=mask, past_key_values=past).logits
        assert_close(step, eager(tokens, attention_mask=mask).logits[:, 20:], **CLOSE)
        if eager.config.sliding_window:  # masks of four dimensions are refused
            return
        tree = torch.ones(21, 21, dtype=torch.bool).tril()
        tree[14:, 7:14] = False
        expected = eager(tokens, attention_mask=tree[None, None].expand(3, 1, -1, -1)).logits
        assert_close(flex(tokens, attention_mask=tree[None, None].expand(3, 1, -1, -1)).logits, expected, **CLOSE)


@pytest.mark.parametrize("scheme", [*KINDS, "rotary/none"])
def test_flex_attention_with_a_static_cache(scheme, interpreted_flex):
    """Its counter moves on between the making of the mask and its use: Llama's later chunks see the future by it."""
    model = make_model(scheme, attn_implementation="eager", head_dim=16)
    tokens, mask = make_tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("flex_attention")
        past = StaticCache(config=model.config, max_cache_len=24)
        for _ in range(2):  # a cache that is used again has a counter before its first chunk too
            past.reset()
            chunks = [
                model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=past).logits
                for start, end in ((0, 9), (9, 14), (14, 15), (15, 17))
            ]
            assert_close(torch.cat(chunks, dim=1)[mask.bool()], expected, **CLOSE)


@pytest.mark.parametrize("scheme", ["rotary", "linear_cpb"])
def test_compiled_flex_attention_is_eager(scheme):
    torch._dynamo.reset()
    eager = make_model(scheme, attn_implementation="eager", head_dim=16)
    flex = make_model(scheme, attn_implementation="flex_attention", head_dim=16)
    tokens = make_tokens(3, 21)
    with torch.no_grad():
        assert_close(flex(tokens).logits, eager(tokens).logits, **CLOSE)


def test_attention_is_switched_at_run_time():
    model, tokens = make_model("linear_cpb"), make_tokens(2, 9)
    expected = model(tokens).logits
    model.set_attn_implementation("eager")
    assert model(tokens, output_attentions=True).attentions[0].shape == (2, 6, 9, 9)
    assert_close(model(tokens).logits, expected, **CLOSE)


# --- queries that see no key


# logits up to 10, and the norm of a parameter's gradient beside its own; tables are fp32 beside fp64 too
PADDED = {torch.float32: (2e-5, 1e-4), torch.float64: (2e-6, 1e-5), torch.bfloat16: (0.3, 0.2)}


@pytest.mark.parametrize("dtype", PADDED, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("scheme", KINDS)
def test_padding_leaves_no_trace(scheme, implementation, dtype, interpreted_flex):
    """Left padding sees nothing but padding, by any mask: the other row, logits and gradients are as without it."""
    tokens, real = make_tokens(2, 13), torch.ones(2, 13, dtype=torch.bool)
    real[1, :5] = False
    labels = tokens.masked_fill(~real, -100)
    labels[1, 5] = -100  # no token that counts is predicted by padding

    models = [make_model(scheme, attn_implementation=name, head_dim=16) for name in ("eager", implementation)]
    for name, parameter in chain(*(model.named_parameters() for model in models)):
        if name.endswith("dape.a"):  # out of its bounds, the gradient is cut for each forward pass by itself
            parameter.data.clamp_(min=0.1)
    reference, model, rows = models[0].double(), models[1].to(dtype), (tokens[:1], tokens[1:, 5:])
    outputs = [reference(row, labels=row, num_items_in_batch=12 + 7) for row in rows]
    sum(output.loss for output in outputs).backward()
    expected = torch.cat([output.logits[0] for output in outputs]).detach()

    hidden = ~(real[:, None, None] & torch.ones(13, 13, dtype=torch.bool).tril())
    additive = [
        torch.zeros(2, 1, 13, 13, dtype=dtype).masked_fill(hidden, low) for low in (torch.finfo(dtype).min, -math.inf)
    ]
    position_ids, (close, close_gradient) = (real.cumsum(-1) - 1).clamp(min=0), PADDED[dtype]
    for mask in (real.long(), ~hidden, *additive):
        model.zero_grad()
        with torch.set_grad_enabled(implementation != "flex_attention"):  # which has no gradients on CPUs
            output = model(tokens, attention_mask=mask, position_ids=position_ids, labels=labels)
        assert_close(output.logits[real].double(), expected, rtol=0, atol=close)
        if implementation == "flex_attention":
            continue
        output.loss.backward()
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters()):
            error = (parameter.grad - other.grad).norm() / other.grad.norm().clamp(min=0.1)
            assert error < close_gradient, f"{name}: relative error {error:.1e}"


# --- flash attention, by a double of its kernel: none of these machines can run the real one


def varlen_reference(query, key, value, cu_seq_lens, scaling, window=None):
    """What flash attention computes from (N, H, D) and the bounds of the sequences in it."""
    pieces = []
    for start, end in zip(cu_seq_lens[:-1].tolist(), cu_seq_lens[1:].tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        pieces.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling))
    return torch.cat(pieces, dim=1).transpose(0, 1)


def flash_double(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """The decisions of transformers' `flash_attention_forward`: bounds if given, else one sequence in each row."""
    assert attention_mask is None and "position_ids" not in kwargs
    batch_size, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch_size + 1) * length, length)
    else:
        assert cu_seq_lens_q.dtype == torch.int32 and int(kwargs["max_length_q"]) == int(cu_seq_lens_q.diff().max())
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_reference(*flat, cu_seq_lens_q, scaling, kwargs.get("sliding_window"))
    return out.unflatten(0, (batch_size, length)), None


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_double)

    def make(scheme):
        model = make_model(scheme)
        model.config._attn_implementation = "flash_attention_2"
        return model

    return make


@pytest.mark.parametrize("scheme", ["none", "learned", "sinusoidal", "rotary", "rotary/none"])
def test_flash_attention_keeps_to_the_documents_of_every_row(scheme, flash):
    """Its masks say nothing of documents: without the bounds, rows beyond the first would leak silently."""
    model, expected, tokens = flash(scheme), make_model(scheme), make_tokens(3, 14)
    for position_ids in (
        None,
        torch.arange(14)[None] + 30,
        torch.stack([torch.cat([torch.arange(n) for n in cuts]) for cuts in ((14,), (3, 11), (5, 5, 4))]),
        torch.cat((torch.arange(6), torch.arange(8) + 4))[None].expand(3, -1),
    ):
        assert_close(
            model(tokens, position_ids=position_ids, use_cache=False).logits,
            expected(tokens, position_ids=position_ids).logits,
            **CLOSE,
        )
    packed = torch.cat((torch.arange(6), torch.arange(8)))[None].expand(3, -1)
    mask = torch.ones_like(tokens)
    mask[:, 12:] = 0
    with pytest.raises(ValueError, match="`attention_mask` must be None for packed sequences with flash attention"):
        model(tokens, position_ids=packed, attention_mask=mask)


# --- refusals


@pytest.mark.parametrize("scheme", BIASED)
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "paged|eager", "paged|sdpa"])
def test_kernels_that_would_drop_the_bias_are_refused(scheme, implementation, tmp_path):
    message = (
        rf"must be one of \['eager', 'sdpa', 'flex_attention'\].*'{scheme}', got '{implementation.replace('|', '.')}'"
    )
    with pytest.raises(ValueError, match=message):
        RelPosForCausalLM._from_config(make_config(scheme), attn_implementation=implementation)
    model = make_model(scheme)
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(implementation)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    model.config._attn_implementation = implementation  # past every check of ours
    with pytest.raises(ValueError, match=message):
        model(make_tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("scheme", list_position_embeddings())
def test_what_a_model_says_that_it_supports(scheme):
    for model in (make_model(scheme), make_model(scheme).model):
        assert model._supports_flash_attn == (scheme in UNBIASED)
        assert model._supports_attention_backend == (scheme in UNBIASED)
        assert model._supports_flex_attn and model._supports_sdpa
        if hasattr(type(model), "supports_context_parallel"):
            assert model.supports_context_parallel == (scheme in UNBIASED)


@pytest.mark.parametrize("scheme", [*KINDS, "rotary/none"])
def test_continuous_batching_is_generate_or_refused(scheme):
    model = make_model(scheme)
    prompts = [make_tokens(length, seed=length).tolist() for length in (5, 11, 8)]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else the cache fills most of the memory
    if scheme in BIASED:
        with pytest.raises(
            ValueError, match=rf"continuous batching .* '{scheme}': use `generate`, with prompts padded"
        ):
            model.generate_batch(prompts, generation_config=options)
        return
    batch = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small, warmup=False)
    generated = [request.generated_tokens for request in batch.values()]
    expected = [
        make_model(scheme).generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert sorted(generated) == sorted(expected)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_follow_the_row_are_refused_where_rows_hold_several_requests(rope_type):
    factors = {"factor": 4.0} if rope_type == "dynamic" else {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = make_model("rotary", rope_parameters={"rope_type": rope_type, **factors})
    with pytest.raises(ValueError, match="continuous batching puts several sequences into one row"):
        model.generate_batch([[5, 6, 7], [8, 9]], generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("scheme", KINDS)
def test_wrong_shapes_are_errors(scheme, implementation):
    model, tokens = make_model(scheme, attn_implementation=implementation), make_tokens(2, 9)
    for shape in ((2, 5), (2, 12), (3, 9), (1, 9), (2, 9, 9), (9,)):
        for mask in (torch.ones(shape), torch.ones(shape).index_fill(-1, torch.tensor([0]), 0)):
            with pytest.raises(ValueError, match=r"`attention_mask` must be of shape \(2, .*\+ 9\), got \("):
                model(tokens, attention_mask=mask.long())
    past = model(tokens).past_key_values
    with pytest.raises(ValueError, match=r"got \(2, 10\) with 9 cached tokens"):
        model(tokens[:, :2], attention_mask=torch.ones(2, 10), past_key_values=past)
    with pytest.raises(RuntimeError, match="must match"):
        model(tokens, attention_mask=torch.ones(2, 1, 9, 4).bool())
    with pytest.raises(RuntimeError, match="must match"):
        model(tokens, past_key_values=model(tokens[:1]).past_key_values)


# --- tensor parallelism


TENSOR_PARALLEL = """
import sys, torch
import torch.distributed as dist
import hf_relpos
from transformers import AutoModelForCausalLM

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto")
assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 24
tokens = torch.load(f"{folder}/tokens.pt")
output = model(tokens, labels=tokens)
output.loss.backward()
whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
if rank == 0:
    torch.save({"logits": output.logits.detach(), "gradients": gradients}, f"{folder}/result.pt")
dist.barrier()
dist.destroy_process_group()
"""


QWEN3 = dict(use_gated_mlp=True, qk_norm="head", attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("scheme", ["fox", "rotary as in Qwen3"])
def test_tensor_parallel_is_one_process_with_gradients(scheme, tmp_path):
    """Each rank has half of the heads; what all ranks hold whole, such as a CPB's MLP, gets the whole gradient."""
    scheme, _, architecture = scheme.partition(" as in ")
    fields = {"vocab_size": 98} | (QWEN3 if architecture else {})  # the ranks share the vocabulary out too
    model, tokens = make_model(scheme, **fields), make_tokens(2, 11)
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [
        forked.start(
            ["-c", TENSOR_PARALLEL, tmp_path, rank],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-2000:]
    result = torch.load(tmp_path / "result.pt")
    output = model(tokens, labels=tokens)
    output.loss.backward()
    assert_close(result["logits"], output.logits.detach(), **CLOSE)
    for name, parameter in model.named_parameters():
        error = (result["gradients"][name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_vllm_finds_the_call_of_the_attention_function():
    """It reads the source of an attention module's `forward` for exactly one call of what that takes from
    `ALL_ATTENTION_FUNCTIONS`, and `scaling` there; it serves no model without."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(RelPosAttention.forward))))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
    found = [node for node in found if ast.unparse(node.value.func).startswith("ALL_ATTENTION_FUNCTIONS.")]
    names = {target.id for node in found for target in node.targets}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    assert len(calls) == 1
    assert {key.arg: ast.unparse(key.value) for key in calls[0].keywords}["scaling"] == "self.scaling"
