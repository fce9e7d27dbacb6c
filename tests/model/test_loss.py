"""The loss without the logits: the same numbers as transformers' loss of the logits, and less memory."""

import pytest
import torch
from conftest import make_model, make_tokens
from test_distance_bias import LargestTensor
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_relpos.model import chunked_loss
from hf_relpos.model.chunked_loss import _sum_losses, linear_cross_entropy


def make_inputs(dtype=torch.float32, vocab_size=97):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 20, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (3, 20), generator=generator)
    labels[1, :9], labels[2] = -100, -100
    return hidden, weight, labels


@pytest.fixture(params=[7 * 97, 2**22], ids=["chunks of 7", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("given", ["nothing", "number", "tensor", "shifted", "ignored"])
def test_loss_and_gradients_are_transformers(given, chunks):
    hidden, weight, labels = make_inputs()
    options = {"number": {"num_items_in_batch": 77}, "tensor": {"num_items_in_batch": torch.tensor(77)}}.get(given, {})
    if given == "shifted":
        options = {"shift_labels": labels.roll(3, dims=1)}
    if given == "ignored":
        options, labels = {"ignore_index": 5}, labels.masked_fill(labels < 9, 5)
    ours = linear_cross_entropy(hidden, weight, labels, **options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = ForCausalLMLoss(exact[0] @ exact[1].T, labels, len(weight), **options)
    assert_close(ours.double(), theirs, rtol=1e-6, atol=0, check_dtype=False)
    scaled = torch.autograd.grad(3.0 * ours, (hidden, weight))
    for actual, expected in zip(scaled, torch.autograd.grad(3.0 * theirs, exact), strict=True):
        assert_close(actual.double(), expected, rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden states", "weight"])
def test_no_gradient_of_what_is_frozen(frozen, chunks):
    inputs = make_inputs()
    *both, labels = inputs
    (expected,) = torch.autograd.grad(linear_cross_entropy(*inputs), both[1 - frozen])
    both[frozen].requires_grad_(False)
    (found,) = torch.autograd.grad(linear_cross_entropy(*inputs), both[1 - frozen])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(3, 19), (3, 21), (2, 20)], ids=str)
def test_labels_of_another_shape_are_refused(shape):
    hidden, weight, _ = make_inputs()
    with pytest.raises(ValueError, match=r"`labels` must be of shape \(3, 20\), a label for each token, got"):
        linear_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.long))


def test_large_logits_neither_overflow_nor_lose_the_loss():
    """The target has a probability of exp(−2000): its loss is 2000, its gradient that of the others."""
    hidden, weight, labels = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[-1000.0], [1000.0]]), torch.tensor([[1, 0]])
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    assert float(loss) == 2000.0
    loss.backward()
    assert hidden.grad.flatten().tolist() == [2000.0, 0.0] and weight.grad.flatten().tolist() == [-1.0, 1.0]


def test_half_precision_is_that_of_the_matrix_products():
    hidden, weight, labels = make_inputs(torch.bfloat16)
    ours = linear_cross_entropy(hidden, weight, labels)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = ForCausalLMLoss(exact[0] @ exact[1].T, labels, len(weight))
    assert ours.dtype == torch.float32
    assert_close(ours.double(), theirs, rtol=1e-2, atol=0, check_dtype=False)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    for actual, expected in zip(gradients, torch.autograd.grad(theirs, exact), strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_operator_keeps_the_promises_of_a_custom_operator():
    hidden, weight, labels = make_inputs()
    arguments = hidden.flatten(0, 1).detach().requires_grad_(), weight.detach().requires_grad_(), labels.flatten()
    torch.library.opcheck(_sum_losses, (*arguments, True, True))
    torch.library.opcheck(_sum_losses, (arguments[0], arguments[1].detach(), arguments[2], True, False))
    torch.library.opcheck(_sum_losses, (*(x.detach() for x in arguments), False, False))


@pytest.mark.parametrize("scheme", ["none", "linear_cpb"])
def test_a_model_that_skips_its_logits_learns_the_same(scheme):
    model, tokens = make_model(scheme), make_tokens(3, 20)
    labels = tokens.masked_fill(tokens < 20, -100)
    outputs = []
    for model.skip_logits in (False, True):
        model.zero_grad()
        output = model(tokens, labels=labels, num_items_in_batch=41)
        output.loss.backward()
        outputs.append((output, [parameter.grad for parameter in model.parameters()]))
    (with_logits, expected), (without, actual) = outputs
    assert with_logits.logits.shape == (3, 20, 97) and without.logits is None
    assert_close(without.loss, with_logits.loss)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert model(tokens).logits is not None, "without labels there is nothing else to return"


def test_the_loss_and_its_gradient_hold_no_logits(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", 50 * 997)
    hidden, weight = torch.randn(1, 500, 16), torch.randn(997, 16)
    with LargestTensor() as mode:
        _sum_losses._init_fn(hidden[0], weight, torch.randint(0, 997, (500,)), True, True)
    assert mode.largest <= 50 * 997


@pytest.mark.parametrize("change", ["adapter", "bias", "other loss"])
def test_a_head_that_is_no_plain_matrix_gives_its_logits(change):
    """An adapter's or a quantiser's layer computes more than the product with its weight."""
    model, tokens = make_model("none"), make_tokens(2, 9)
    model.skip_logits = True
    if change == "adapter":
        model.lm_head = torch.nn.Sequential(model.lm_head)
    elif change == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.ones(97))
    else:
        model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    output = model(tokens, labels=tokens)
    assert output.logits is not None
    if change == "other loss":
        assert output.loss == output.logits.sum()
