"""Attention with a table of the distances: against a dense reference in float64, its limits, and who uses it when."""

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import make_config, make_model, make_tokens, table_path
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from hf_relpos import PositionEmbedding, RelPosConfig, RelPosForCausalLM, register_position_embedding
from hf_relpos.evaluation.evaluate import bias_curves
from hf_relpos.model import attention_cpu, attention_torch, scheme_registry
from hf_relpos.model.attention_distance_bias import _attend, _attend_backward, distance_bias_attention
from hf_relpos.model.attention_kernel import TableCall, select_kernel
from hf_relpos.model.attention_native import native_is_ready
from hf_relpos.model.attention_torch import BlockKernel
from hf_relpos.model.kept_steps import _KEPT
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.model.scheme_distance_bias import FIRE
from hf_relpos.model.scheme_registry import PositionEmbeddings


CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 logits of magnitude 1..10, summed in another order
# query length, key length, offset: equal, one block and a bit, one row, a step, a chunk, room behind the last query
LENGTHS = [(100, 100, 0), (65, 65, 0), (1, 1, 0), (1, 70, 69), (130, 300, 170), (7, 200, 50)]


def reference(query, key, value, table, *, scaling, is_causal, offset, key_mask=None, documents=None, window=None):
    """The whole (B, H, Q, K) matrix; a row without a key is 0."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    distance = torch.arange(query.shape[2])[:, None] + offset - torch.arange(key.shape[2])
    visible = (distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool))[None, None]
    if window is not None:
        visible = visible & (distance < window)
        table = torch.nn.functional.pad(table, (0, max(key.shape[2] - table.shape[1], 0)))
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    if documents is not None:
        own = documents[:, offset : offset + query.shape[2], None] == documents[:, None]
        visible = visible & own[:, None]
    scores = query @ key.transpose(2, 3) * scaling + table[:, distance.abs()]
    scores = torch.where(visible, scores, -math.inf)
    weights = torch.where(visible.any(-1, keepdim=True), scores, 0.0).softmax(-1)
    return torch.where(visible, weights, 0.0) @ value


def make_inputs(lengths, num_groups=6, seed=0, batch_size=3, num_heads=6, head_dim=16, dtype=torch.float32):
    """query, key, value as the layers lay them out, table and gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    query_length, num_keys, _ = lengths

    def draw(length, heads):
        return torch.randn(batch_size, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    tensors = [draw(query_length, num_heads), draw(num_keys, num_groups), draw(num_keys, num_groups)]
    longest = max(num_keys, lengths[2] + query_length) + 3
    return *tensors, torch.randn(num_heads, longest, generator=generator), draw(query_length, num_heads)


def make_masks(num_keys, kind):
    generator = torch.Generator().manual_seed(1)
    key_mask = documents = None
    if "padding" in kind:
        key_mask = torch.rand(3, num_keys, generator=generator) > 0.2
        key_mask[1, : num_keys // 2] = False  # with a causal mask, rows that see nothing
    if "documents" in kind:
        documents = torch.randint(0, 2, (3, num_keys), generator=generator).cumsum(1) // 9
    return {"key_mask": key_mask, "documents": documents}


def gradients(function, inputs, grad_out):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)


@pytest.fixture(params=["native", "small chunks", "views", "tiles", "without the kernel", "as it is"])
def blocks(request, monkeypatch):
    """The native kernel, and all ways through the blockwise algorithm, at lengths of a test."""
    if request.param == "native" and not native_is_ready():
        pytest.skip("no native kernel here")
    if request.param != "native":
        request.getfixturevalue("without_native")
    if request.param == "small chunks":
        monkeypatch.setattr(attention_torch, "CHUNK_SCORES", 20_000)
    if request.param == "views":
        monkeypatch.setattr(attention_torch, "LONGEST_COPY", 0)
        monkeypatch.setattr(attention_torch, "LONGEST_COPY_BACKWARD", 0)
    if request.param == "tiles":
        monkeypatch.setattr(attention_torch, "TILE_KEYS", 48)
    if request.param == "without the kernel":
        monkeypatch.setattr(attention_torch, "CPU_FLASH", None)


@pytest.mark.parametrize("masks", ["nothing", "padding", "documents", "padding and documents"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("num_groups", [6, 2])
def test_attention_and_gradients_are_the_reference(num_groups, is_causal, masks, blocks):
    for lengths in LENGTHS:
        *inputs, grad_out = make_inputs(lengths, num_groups)
        options = {"scaling": 0.3, "is_causal": is_causal, "offset": lengths[2], **make_masks(lengths[1], masks)}
        ours = gradients(partial(distance_bias_attention, **options), inputs, grad_out)
        theirs = gradients(partial(reference, **options), [x.double() for x in inputs], grad_out.double())
        for name, actual, expected in zip(("out", "query", "key", "value", "table"), ours, theirs, strict=True):
            # fp32 sums of up to 3 · 130 terms of size 1 in the table's gradient
            assert (actual - expected).abs().max() < 3e-5, f"{name} of lengths {lengths}"


@pytest.mark.parametrize("masks", ["nothing", "padding and documents"])
@pytest.mark.parametrize("num_groups", [6, 2])
@pytest.mark.parametrize("window", [1, 20, 64, 150])
def test_windows_are_the_reference(window, num_groups, masks, blocks):
    """Also with a table that ends where the window does."""
    for lengths in LENGTHS:
        *inputs, grad_out = make_inputs(lengths, num_groups)
        inputs[3] = inputs[3][:, : min(window, lengths[1])]
        options = {"scaling": 0.3, "is_causal": True, "offset": lengths[2], "window": window}
        options |= make_masks(lengths[1], masks)
        ours = gradients(partial(distance_bias_attention, **options), inputs, grad_out)
        theirs = gradients(partial(reference, **options), [x.double() for x in inputs], grad_out.double())
        for name, actual, expected in zip(("out", "query", "key", "value", "table"), ours, theirs, strict=True):
            assert (actual - expected).abs().max() < 3e-5, f"{name} of lengths {lengths}"


def test_a_window_reads_the_keys_that_it_holds_alone(cpu_kernel):
    *inputs, grad_out = make_inputs((2000, 2000, 0), batch_size=1)
    for x in inputs[1:3]:
        x[:, :, :1500] = math.nan
    out = distance_bias_attention(*inputs, window=100)
    assert out[:, :, 1856:].isfinite().all(), "keys from 1856 - 255 - 99 on are read"


def test_defaults_are_those_of_attention():
    query, key, value, table, _ = make_inputs((9, 30, 21))
    expected = reference(query, key, value, table, scaling=16**-0.5, is_causal=True, offset=21)
    assert_close(distance_bias_attention(query, key, value, table), expected, **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [(5, 5, 0), (67, 67, 0), (3, 11, 6)], ids=str)
def test_gradients_in_float64(lengths, is_causal):
    """By finite differences, at odd sizes."""
    *inputs, _ = make_inputs(lengths, num_groups=1, batch_size=2, num_heads=2, head_dim=3, dtype=torch.float64)
    inputs = [x.double().requires_grad_() for x in inputs]
    options = {"is_causal": is_causal, "offset": lengths[2], "key_mask": torch.rand(2, lengths[1]) > 0.2}
    assert torch.autograd.gradcheck(partial(distance_bias_attention, **options), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(dtype, cpu_kernel):
    """The inputs' rounding aside, only the results are rounded."""
    *inputs, grad_out = make_inputs((130, 130, 0), 2, dtype=dtype)
    ours = gradients(partial(distance_bias_attention, scaling=0.3), inputs, grad_out)
    exact = [x.double() for x in inputs]
    theirs = gradients(partial(reference, scaling=0.3, is_causal=True, offset=0), exact, grad_out.double())
    assert [x.dtype for x in ours] == [dtype] * 4 + [torch.float32]
    rounding = torch.finfo(dtype).eps
    for actual, expected in zip(ours, theirs, strict=True):
        # the gradients read the rounded output, in the sum of its product with the output's gradient
        assert (actual.double() - expected).abs().max() <= 2 * rounding * expected.abs().max()


@pytest.mark.parametrize("num_groups", [6, 2])
@pytest.mark.parametrize("masks", ["nothing", "padding"])
def test_a_line_in_bf16_is_a_value_per_key(masks, num_groups, without_native, monkeypatch):
    """As exact as a table, in one call of a kernel: the blocks are not needed."""
    monkeypatch.setattr(attention_cpu, "cpu_has_fast_bf16", lambda: True)
    monkeypatch.setattr(BlockKernel, "forward", lambda *args: pytest.fail("a table"))
    query, key, value, _, grad_out = make_inputs((130, 130, 0), num_groups, dtype=torch.bfloat16)
    table = -torch.linspace(0.01, 0.5, 6)[:, None] * torch.arange(140.0)
    key_mask = make_masks(130, masks).get("key_mask")
    tensors = [x.detach().requires_grad_() for x in (query, key, value)]
    out = distance_bias_attention(*tensors, table, key_mask=key_mask)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference(
        *exact, table.double(), scaling=0.25, is_causal=True, offset=0, key_mask=key_mask, documents=None
    )
    ours, theirs = (torch.autograd.grad(o, x, g) for o, x, g in ((out, tensors, grad_out), (expected, exact, grad_out)))
    for actual, wanted in zip((out, *ours), (expected, *theirs), strict=True):
        # weights and their gradients are rounded to bf16 before the products, as in attention without a bias
        assert (actual.double() - wanted).abs().max() <= 3 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


def kernel_of(query, table):
    return select_kernel(query, query, table, TableCall(1.0)).name


def test_what_is_no_fixed_line_in_bf16_goes_by_the_table(without_native, monkeypatch):
    monkeypatch.setattr(attention_cpu, "cpu_has_fast_bf16", lambda: True)
    query, line = torch.zeros(1, 2, 9, 4, dtype=torch.bfloat16), -torch.arange(9.0)[None] * torch.tensor([[0.5], [0.3]])
    assert kernel_of(query, line) == "key_bias"
    assert kernel_of(query.float(), line) == "blocks"
    assert kernel_of(query, line.clone().requires_grad_()) == "blocks"
    bent = line.clone()
    bent[1, 5] -= 1e-6
    assert kernel_of(query, bent) == "blocks"
    model = make_model("alibi").to(torch.bfloat16)
    assert model.attention_path() == "distance_bias:key_bias"
    assert make_model("linear_cpb").to(torch.bfloat16).attention_path() == "distance_bias:blocks"
    monkeypatch.setattr(attention_cpu, "cpu_has_fast_bf16", lambda: False)
    assert model.attention_path() == "distance_bias:blocks"


@pytest.mark.parametrize("is_fast", [True, False])
def test_blocks_multiply_in_bf16_where_that_is_fast(is_fast, without_native, monkeypatch):
    monkeypatch.setattr(attention_cpu, "cpu_has_fast_bf16", lambda: is_fast)
    test_half_precision_sums_in_fp32(torch.bfloat16, "blocks")


def test_large_fp16_scores_are_finite():
    """q · k reaches 10⁶, past the range of fp16."""
    query, key, value, table, grad_out = make_inputs((40, 40, 0), dtype=torch.float16)
    for results in (
        gradients(distance_bias_attention, (query * 100, key * 100, value, table), grad_out),
        gradients(distance_bias_attention, (query, key, value, table * 1e30), grad_out),
    ):
        assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_two_runs_are_bit_identical(num_threads, cpu_kernel):
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        *inputs, grad_out = make_inputs((300, 300, 0))
        first, second = (gradients(distance_bias_attention, inputs, grad_out) for _ in range(2))
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("num_threads", [1, 2])
def test_tiny_weights_are_zero_and_the_caller_keeps_its_mode(num_threads, cpu_kernel):
    """Denormal weights, which a steep bias has in plenty, take a processor a hundred times as long as others."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        query, key, value, _, grad_out = make_inputs((400, 400, 0))
        table = -torch.linspace(0.1, 0.6, 6)[:, None] * torch.arange(400.0)
        weights = table.double()[:, :400].exp()
        assert ((weights > 1e-44) & (weights < 1e-38)).sum() > 100
        tensors = [x.requires_grad_() for x in (query, key, value, table)]
        distance_bias_attention(*tensors).backward(grad_out)
        for x in tensors:
            assert not ((x.grad != 0) & (x.grad.abs() < torch.finfo(torch.float32).tiny)).any()
        assert float(torch.tensor(2.0**-140).mul_(1.0)) > 0
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_inference_mode_reaches_the_threads(cpu_kernel):
    query, key, value, table, _ = make_inputs((100, 100, 0))
    expected = distance_bias_attention(query, key, value, table)
    with torch.inference_mode():
        assert_close(distance_bias_attention(query, key, value, table), expected, rtol=0, atol=0)


@pytest.mark.parametrize("masks", ["nothing", "padding and documents"])
def test_memory_is_linear_in_the_length(masks):
    """No tensor is longer than a constant times N, forward and backward, with all masks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode sees the operations of its own thread
    largest = {}
    try:
        for length in (2048, 4096):
            *inputs, grad_out = make_inputs((length, length, 0), batch_size=3, num_heads=1, num_groups=1, head_dim=4)
            call = TableCall(0.5, **make_masks(length, masks))
            with LargestTensor() as mode:
                out, lse = attention_torch.block_forward(*inputs, call)
                attention_torch.block_backward(grad_out, *inputs[:3], out, lse, inputs[3], call)
            largest[length] = mode.largest
    finally:
        torch.set_num_threads(threads)
    assert largest[4096] < 2.1 * largest[2048] < 2048**2


def test_operators_keep_the_promises_of_custom_operators():
    for is_causal, masks in itertools.product((True, False), ("nothing", "padding and documents")):
        *inputs, grad_out = make_inputs((12, 20, 8), 2)
        masks_of_call = make_masks(20, masks)
        arguments = ("blocks", 0.3, is_causal, 8, masks_of_call.get("key_mask"), masks_of_call.get("documents"), None)
        inputs = [x.requires_grad_() for x in inputs]
        torch.library.opcheck(_attend, (*inputs, *arguments))
        inputs = [x.detach() for x in inputs]
        out, lse = _attend(*inputs, *arguments)
        torch.library.opcheck(_attend_backward, (grad_out, *inputs[:3], out, lse, inputs[3], *arguments))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(bias_table=torch.zeros(6, 29)),
            r"`bias_table` must hold the distances 0..29; got .*bias_table \(6, 29\)",
        ),
        (dict(bias_table=torch.zeros(5, 40)), r"heads of `query` must be those of `bias_table`.*bias_table \(5, 40\)"),
        (dict(bias_table=torch.zeros(6, 40).half()), r"must be in float32.*torch.float16"),
        (dict(bias_table=torch.zeros(40)), r"`bias_table` 2; got"),
        (dict(bias_table=torch.full((6, 40), math.inf)), "`bias_table` must be finite"),
        (dict(bias_table=torch.full((6, 40), math.nan)), "`bias_table` must be finite"),
        (dict(key=torch.zeros(3, 4, 30, 16)), r"`key` and `value` must have one shape.*key \(3, 4, 30, 16\)"),
        (dict(key=torch.zeros(3, 4, 30, 16), value=torch.zeros(3, 4, 30, 16)), "a multiple of those of `key`"),
        (dict(key=torch.zeros(2, 6, 30, 16), value=torch.zeros(2, 6, 30, 16)), "the batch and head size of `query`"),
        (dict(query=torch.zeros(3, 6, 9, 16).half()), "must have one floating point dtype"),
        (dict(query=torch.zeros(3, 6, 9, 16).long(), key=torch.zeros(3, 6, 9, 16).long()), "floating point dtype"),
        (dict(offset=22), "must hold the slots of all queries"),
        (dict(offset=-1), "must hold the slots of all queries"),
        (dict(key_mask=torch.ones(3, 29).bool()), r"`key_mask` must be \(3, 30\) torch.bool, not \(3, 29\)"),
        (dict(key_mask=torch.ones(3, 30)), r"torch.bool, not \(3, 30\) torch.float32"),
        (dict(documents=torch.ones(2, 30).long()), r"`documents` must be \(3, 30\), not \(2, 30\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    query, key, value, table, _ = make_inputs((9, 30, 21))
    arguments = {"query": query, "key": key, "value": value, "bias_table": table, **change}
    with pytest.raises(ValueError, match=message):
        distance_bias_attention(**arguments)


# --- the model


def pads(tokens):
    """Rows with padding on the left, on the right and without."""
    mask = torch.ones_like(tokens)
    mask[1, :9], mask[2, -7:] = 0, 0
    return mask


PATHS = {
    ("none", "sdpa"): "sdpa",
    ("rotary", "eager"): "eager",
    ("linear_cpb", "sdpa"): "a table",
    ("rotary+alibi", "sdpa"): "a table",
    ("linear_cpb", "flex_attention"): "flex_attention:table",
    ("linear_cpb", "eager"): "eager:dense_bias",
    ("fire", "sdpa"): "a table",
    ("fire", "flex_attention"): "flex_attention:dense_bias",
    ("fox", "sdpa"): "a table",
    ("fox", "eager"): "eager:dense_bias",
    ("cope", "sdpa"): "sdpa:dense_bias",
    ("dape", "sdpa"): "sdpa:dense_bias",
    ("fox", "flex_attention"): "flex_attention:dense_bias",
}


@pytest.mark.parametrize("scheme, implementation", PATHS)
def test_the_path_is_said(scheme, implementation):
    model = make_model(scheme, attn_implementation=implementation)
    assert model.attention_path() == model.model.attention_path()
    assert model.attention_path() == PATHS[scheme, implementation].replace("a table", table_path())


def test_attention_dropout_needs_the_weights_in_training():
    model = make_model("linear_cpb", attention_dropout=0.5)
    assert model.attention_path() == table_path()
    assert model.train().attention_path() == "sdpa:dense_bias"
    tokens = make_tokens(2, 9)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.fixture
def dense_is_forbidden(monkeypatch):
    monkeypatch.setattr(
        PositionEmbeddings, "dense_bias", lambda *args, **options: pytest.fail("a bias for each pair of tokens")
    )


@pytest.mark.parametrize("scheme", ["linear_cpb", "alibi", "learned+alibi", "rotary+log_cpb"])
@pytest.mark.parametrize("positions", ["plain", "padded", "packed", "shifted", "cached"])
def test_plain_padded_packed_and_cached_rows_go_by_the_table(scheme, positions, dense_is_forbidden):
    model, tokens = make_model(scheme), make_tokens(3, 33)
    packed = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((33,), (6, 27), (9, 20, 4))])
    if positions == "cached":
        past = model(tokens[:, :20], attention_mask=pads(tokens)[:, :20], use_cache=True).past_key_values
        for start, stop in ((20, 25), (25, 26), (26, 33)):
            chunk = {"attention_mask": pads(tokens)[:, :stop], "past_key_values": past}
            past = model(tokens[:, start:stop], **chunk).past_key_values
        return
    inputs = {
        "plain": {},
        "padded": {"attention_mask": pads(tokens)},
        "packed": {"position_ids": packed},
        "shifted": {"position_ids": torch.arange(33)[None] + 11},
    }[positions]
    model(tokens, labels=tokens, **inputs).loss.backward()


def test_a_bias_for_each_pair_is_never_silent(monkeypatch):
    model, tokens = make_model("alibi"), make_tokens(2, 9)
    told = []
    monkeypatch.setattr("hf_relpos.model.attention_planner.logger.warning_once", told.append)
    model(tokens)
    model(tokens, attention_mask=pads(make_tokens(3, 9))[:2])
    assert not told
    model(tokens, position_ids=torch.arange(9)[None] * 3)
    model(tokens, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool).tril())
    reasons = [
        "the positions skip numbers, or padding stands between tokens.",
        "`attention_mask` has 4 dimensions.",
    ]
    assert [text.partition(": ")[2] for text in told] == reasons


def test_a_scheme_with_a_bias_of_its_own_is_asked_for_it():
    class Parity(PositionEmbedding):
        """A bias that is no function of the distance."""

        kind = "absolute"

        def dense_bias(self, positions):
            return (positions.key[:, None, None] % 2).float().expand(-1, 6, positions.query.shape[1], -1)

    register_position_embedding("parity")(Parity)
    try:
        config = make_config("parity+alibi")
        assert not config.has_distance_table
        torch.manual_seed(0)
        model = RelPosForCausalLM(config).eval()
        assert model.attention_path() == "sdpa:dense_bias"
        tokens = make_tokens(2, 9)
        assert not torch.allclose(model(tokens).logits, make_model("alibi")(tokens).logits)
    finally:
        del POSITION_EMBEDDINGS["parity"]


@pytest.mark.parametrize("scheme", ["linear_cpb", "alibi", "t5", "kerple_power", "rotary+log_cpb"])
def test_gradients_are_those_of_the_dense_bias(scheme):
    table, dense = make_model(scheme), make_model(scheme, attn_implementation="eager")
    tokens = make_tokens(3, 70)
    mask = pads(tokens)
    labels = tokens.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    for model in (table, dense):
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
    for (name, ours), theirs in zip(table.named_parameters(), dense.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


class Graphs:
    """A backend of `torch.compile` that looks at what its graphs compute, forward and backward.

    Attributes:
        largest: the number of elements of the largest tensor in them.
    """

    def __init__(self):
        self.largest = 0

    def __call__(self, module, inputs):
        return aot_autograd(fw_compiler=self.look, bw_compiler=self.look)(module, inputs)

    def look(self, module, inputs):
        found = [node.meta.get("val") for node in module.graph.nodes]
        self.largest = max(self.largest, *(x.numel() for x in found if isinstance(x, torch.Tensor)))
        return module.forward


@pytest.mark.parametrize("scheme", ["linear_cpb", "alibi+fox", "fire"])
def test_compiled_training_is_training(scheme):
    """On rows with padding, before, within and behind: a table of the distances stays one."""
    torch._dynamo.reset()
    model, tokens, graphs = make_model(scheme), make_tokens(4, 72), Graphs()
    mask = pads(tokens)
    mask[3, 30:33] = 0
    labels = tokens.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    model(tokens, attention_mask=mask, labels=labels, skip_logits=True).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    compiled(tokens, attention_mask=mask, labels=labels, skip_logits=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    # (4, 72) tokens with 192 channels inside of the MLP; FIRE, which may be no table, has a bias of 32 channels a pair
    assert graphs.largest <= 4 * 72 * 192 or scheme == "fire", "no (4, 6, 72, 72)"


def test_flex_attention_gives_the_table_its_gradient(monkeypatch):
    """FlexAttention refuses gradients on CPUs by name of the device, though its reference computes them."""
    flex = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training=False, **kwargs: flex.flex_attention(*args, **kwargs),
    )
    create = flex.create_block_mask
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask", lambda *args, _compile, **kwargs: create(*args, **kwargs)
    )
    model, expected = make_model("linear_cpb", attn_implementation="flex_attention"), make_model("linear_cpb")
    tokens = make_tokens(2, 21)
    for each in (model, expected):
        each(tokens, labels=tokens).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm(), name


# --- a table that serves the first positions only


def fire(implementation="sdpa", threshold=24, multiplier=1.0, **overrides):
    options = {"pos_embedding_kwargs": {"threshold": threshold}, "attn_implementation": implementation, **overrides}
    model = make_model("fire", **options)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.position_embeddings["fire"].multiplier, multiplier)
    return model


@pytest.mark.parametrize("length, multiplier", [(24, 1.0), (25, 1.0), (25, 1.03), (70, 2.9)])
def test_rows_up_to_the_limit_go_by_the_table(length, multiplier, monkeypatch):
    """Positions 0..24 reach T = 24 and no further."""
    monkeypatch.setattr(FIRE, "dense_bias", lambda *args: pytest.fail("a bias for each pair of tokens"))
    model, tokens = fire(multiplier=multiplier), make_tokens(3, length)
    assert model.attention_path() == table_path()
    model(tokens, attention_mask=pads(tokens), labels=tokens).loss.backward()


@pytest.mark.parametrize("length, multiplier, num_pairs", [(26, 1.0, 1), (25, 0.97, 1), (70, 1.0, 45), (70, 0.02, 69)])
def test_only_the_queries_behind_the_limit_take_pairs(length, multiplier, num_pairs, monkeypatch):
    seen, bias = [], FIRE.dense_bias
    monkeypatch.setattr(FIRE, "dense_bias", lambda self, positions: seen.append(positions) or bias(self, positions))
    fire(multiplier=multiplier)(make_tokens(3, length))
    assert {positions.distance.shape for positions in seen} == {(1, num_pairs, length)}


@pytest.mark.parametrize("threshold", [5, 24, 33, 100])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_both_sides_of_the_limit_are_the_dense_bias_with_gradients(threshold, kind):
    """Of the threshold's factor too, on the table's path."""
    tokens, mask, position_ids = make_tokens(3, 34), None, None
    labels = tokens
    if kind == "padded":
        mask = pads(tokens)
        labels = tokens.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    if kind == "packed":
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((34,), (6, 28), (9, 20, 5))])
    models = [fire(implementation, threshold, 1.01, num_key_value_heads=2) for implementation in ("sdpa", "eager")]
    outputs = [model(tokens, attention_mask=mask, position_ids=position_ids, labels=labels) for model in models]
    real = labels != -100
    assert_close(outputs[0].logits[real], outputs[1].logits[real], **CLOSE)
    for output in outputs:
        output.loss.backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert theirs.grad.norm() > 0
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        # a gradient of one number is a sum of thousands with both signs
        assert error < (1e-3 if ours.numel() == 1 else 1e-4), f"{name}: {error:.1e}"


def test_a_generation_goes_past_the_limit():
    """Steps that share a table, then steps without one; a shift of all positions is none of its business."""
    model, tokens = fire(), make_tokens(2, 40)
    with torch.no_grad():
        expected = model(tokens).logits
        past = model(tokens[:, :19], use_cache=True).past_key_values
        steps = [model(tokens[:, step : step + 1], past_key_values=past).logits for step in range(19, 40)]
        shifted = model(tokens, position_ids=torch.arange(40)[None] + 30).logits
    assert_close(torch.cat(steps, dim=1), expected[:, 19:], **CLOSE)
    assert_close(shifted, expected, **CLOSE)


# --- steps of a generation


@pytest.mark.parametrize("scheme", ["linear_cpb", "alibi", "rotary+log_cpb"])
@pytest.mark.parametrize("make_cache", [lambda config: None, lambda config: StaticCache(config, max_cache_len=200)])
def test_steps_share_their_tables(scheme, make_cache, monkeypatch):
    model, tokens = make_model(scheme), make_tokens(2, 150)
    expected = model(tokens).logits
    computed = []
    table = scheme_registry.distance_table
    counted = lambda scheme, length, device: computed.append(length) or table(scheme, length, device)  # noqa: E731
    monkeypatch.setattr(scheme_registry, "distance_table", counted)
    with torch.no_grad():
        past = model(tokens[:, :1], use_cache=True, past_key_values=make_cache(model.config)).past_key_values
        steps = [
            model(tokens[:, step : step + 1], past_key_values=past, use_cache=True).logits for step in range(1, 150)
        ]
    assert_close(torch.cat(steps, dim=1), expected[:, 1:], **CLOSE)
    assert set(computed) <= {1, 64, 128, 256} and len(computed) <= 4 * 3, "once for each power of two, layer and scheme"


def test_tables_are_computed_anew_when_the_weights_change():
    model, tokens = make_model("linear_cpb"), make_tokens(1, 12)
    with torch.no_grad():
        past = model(tokens[:, :10], use_cache=True).past_key_values
        model(tokens[:, 10:11], past_key_values=past)
        assert past in _KEPT
        for layer in model.model.layers:
            for parameter in layer.self_attn.position_embeddings.parameters():
                parameter.mul_(3.0)
        step = model(tokens[:, 11:], past_key_values=past).logits
        del _KEPT[past]
        past.crop(-1)
        assert torch.equal(step, model(tokens[:, 11:], past_key_values=past).logits)
    del past
    assert not len(_KEPT), "tables live as long as their cache"


def test_a_long_sequence_needs_no_matrix_of_pairs():
    """6000 tokens, 4 heads: the bias of one layer alone would take 576 MB."""
    model = RelPosForCausalLM(RelPosConfig.from_size("xsmall", vocab_size=64, num_hidden_layers=1)).eval()
    with torch.no_grad(), LargestTensor() as mode:
        model(make_tokens(1, 6000, vocab_size=64))
    assert mode.largest < 6000 * 1024 * 2


def test_curves_end_where_the_bias_is_no_curve():
    assert 20 < bias_curves(fire(), 200)["distances"][-1] <= 24
    assert bias_curves(make_model("alibi"), 200)["distances"][-1] > 150


@pytest.mark.parametrize("scheme", ["none", "rotary", "sinusoidal", "rotary/none"])
def test_bf16_without_a_bias_goes_by_a_table_of_zeros(scheme):
    """On CPUs, where torch's own kernel is slow backward; what is not trained, and fp32, stay Llama's bit for bit."""
    model, tokens = make_model(scheme), make_tokens(3, 40)
    assert model.attention_path() == "sdpa"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.attention_path() == (table_path() if native_is_ready() else "sdpa")
    assert model.to(torch.bfloat16).attention_path() == (table_path() if native_is_ready() else "sdpa")
    with torch.no_grad():
        assert model.attention_path() == "sdpa"
    exact = make_model(scheme, attn_implementation="eager")
    for inputs in ({}, {"attention_mask": pads(tokens)}):
        labels = tokens.masked_fill(inputs.get("attention_mask", torch.ones_like(tokens)) == 0, -100)
        losses = [each(tokens, labels=labels, **inputs).loss for each in (model, exact)]
        assert_close(losses[0].float(), losses[1], rtol=0.02, atol=0.02)
        for loss in losses:
            loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters()):
        error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.15, f"{name}: {error:.3f}"  # bf16 weights and activations all the way
    steps = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert steps.shape == (1, 44)
