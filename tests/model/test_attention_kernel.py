"""The interface of kernels: what a further one may do, and what is refused."""

import pytest
import torch
from conftest import make_model, make_tokens

from hf_relpos.model.attention_distance_bias import _attend, _attend_backward, distance_bias_attention
from hf_relpos.model.attention_kernel import TABLE_KERNELS, TableCall, TableKernel, select_kernel
from hf_relpos.model.attention_torch import BlockKernel, block_backward, block_forward


@pytest.fixture
def plain_kernel():
    """A kernel for rows of up to 64 tokens whose results lie in memory as they come."""

    class PlainKernel(TableKernel):
        name = "test_plain"

        @staticmethod
        def supports(query, key, bias_table, call):
            return query.shape[2] <= 64

        @staticmethod
        def forward(query, key, value, bias_table, call):
            out, lse = block_forward(query, key, value, bias_table, call)
            return out.contiguous(), lse

        @staticmethod
        def backward(*arguments):
            *gradients, grad_table = block_backward(*arguments)
            return *(gradient.contiguous() for gradient in gradients), grad_table

    yield PlainKernel
    del TABLE_KERNELS["test_plain"]


def test_a_further_kernel_is_one_class(plain_kernel):
    model, tokens = make_model("linear_cpb"), make_tokens(2, 21)
    expected = make_model("linear_cpb", attn_implementation="eager")(tokens, labels=tokens)
    assert model.attention_path() == "distance_bias:test_plain"
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    model.skip_logits = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens).loss
    compiled.backward()
    torch.testing.assert_close(compiled, expected.loss, rtol=1e-5, atol=1e-5)
    long = torch.zeros(1, 2, 65, 4)
    assert select_kernel(long, long, torch.zeros(2, 65).requires_grad_(), TableCall(1.0)) is not plain_kernel


def test_the_operators_of_a_further_kernel_keep_their_promises(plain_kernel):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 12, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    table = torch.randn(4, 12, generator=generator).requires_grad_()
    call = ("test_plain", 0.3, True, 0, None, None, None)
    torch.library.opcheck(_attend, (query, key, value, table, *call))
    tensors = [x.detach() for x in (query, key, value, table)]
    out, lse = _attend(*tensors, *call)
    torch.library.opcheck(_attend_backward, (torch.ones_like(out), *tensors[:3], out, lse, tensors[3], *call))
    ours = distance_bias_attention(query, key, value, table)
    theirs = BlockKernel.forward(*tensors, TableCall(8**-0.5))[0]
    torch.testing.assert_close(ours, theirs)


def test_a_name_is_new():
    for fields in ({"name": "blocks"}, {}):
        with pytest.raises(TypeError, match="kernel 'Another' must have a `name` that is new"):
            type("Another", (BlockKernel,), fields)
    assert TABLE_KERNELS["blocks"] is BlockKernel
