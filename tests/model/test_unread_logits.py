"""A training step with labels computes its logits when something reads them, and what reads them cannot tell."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from conftest import make_model, make_tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from transformers import Trainer, TrainingArguments

from hf_relpos.model.unread_logits import UnreadLogits


VOCAB = 97
TOKENS = make_tokens(3, 20)


def forward(model, **kwargs):
    return model(TOKENS, labels=TOKENS, **kwargs)


def is_unread(output) -> bool:
    return type(dict.__getitem__(output, "logits")) is UnreadLogits


READS = {
    "attribute": lambda output: output.logits,
    "key": lambda output: output["logits"],
    "get": lambda output: output.get("logits"),
    "index": lambda output: output[1],
    "slice": lambda output: output[:2][1],
    "tuple": lambda output: output.to_tuple()[1],
    "values": lambda output: list(output.values())[1],
    "items": lambda output: dict(output.items())["logits"],
    "fields": lambda output: vars(copy.copy(output))["logits"],
    "tree": lambda output: tree_map(lambda leaf: leaf, output).logits,
    "cast": lambda output: list(output.values())[1].double(),
    "clone": lambda output: list(output.values())[1].clone(),
    "view": lambda output: list(output.values())[1].view(-1, VOCAB),
}
USES = {
    "loss": lambda logits: F.cross_entropy(logits.view(-1, VOCAB).float(), TOKENS.flatten()),
    "in place": lambda logits: logits.mul_(0.5).logsumexp(-1).pow(2).mean(),
    "part in place": lambda logits: (logits[..., 0].zero_(), logits)[1].logsumexp(-1).pow(2).mean(),
}


def gradients(model, value) -> list[torch.Tensor]:
    return torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("read", READS)
def test_logits_that_are_read_are_those_of_the_head(read, use):
    model = make_model("linear_cpb").train()
    expected, found = forward(model, skip_logits=False), forward(model)
    assert is_unread(found) and type(expected.logits) is torch.Tensor
    assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    losses = [output.loss + USES[use](READS[read](output)) for output in (expected, found)]
    assert_close(losses[1], losses[0], rtol=1e-6, atol=0, check_dtype=False)
    for ours, theirs in zip(*(gradients(model, loss) for loss in losses), strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_logits_are_plain_and_the_same_each_time():
    output = forward(make_model("rotary").train())
    logits = output.logits
    assert type(logits) is torch.Tensor and not is_unread(output)
    assert logits.requires_grad and logits.is_contiguous()
    assert output["logits"] is logits and output[1] is logits and output.to_tuple()[1] is logits


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reading_first_without_gradients_loses_none(mode):
    model = make_model("none").train()
    expected, output = forward(model, skip_logits=False), forward(model)
    with mode():
        assert torch.equal(output.logits.argmax(-1), expected.logits.argmax(-1))
    for ours, theirs in zip(*(gradients(model, each.logits.pow(2).sum()) for each in (output, expected)), strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_logits_of_a_step_stay_those_of_its_weights():
    """Tutorials read them after the optimizer; a weight may also change without a trace, through `.data`."""
    model = make_model("alibi").train()
    expected, output = forward(model, skip_logits=False).logits.detach(), forward(model)
    output.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    model.lm_head.weight.data.zero_()
    assert torch.equal(output.logits.detach(), expected)


def test_what_nobody_reads_is_not_computed(monkeypatch):
    monkeypatch.setattr(UnreadLogits, "compute", None)
    output = convert_outputs_to_fp32(forward)(make_model("none").train())  # what the Trainer does in bf16
    output = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)  # as DDP does
    output.loss.backward()
    assert is_unread(output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    model = make_model("linear_cpb").train()
    with torch.autocast("cpu", dtype):
        expected, output = forward(model, skip_logits=False), forward(model)
        wide = convert_outputs_to_fp32(forward)(model)
    assert is_unread(output) and is_unread(wide)
    assert output.logits.dtype == dtype and torch.equal(output.logits, expected.logits)
    assert wide.logits.dtype == torch.float32 and torch.equal(wide.logits, expected.logits.float())
    assert_close(wide.loss, expected.loss, rtol=1e-3, atol=0)


def test_what_is_passed_on_unread_works_as_a_tensor():
    model = make_model("none").train()
    expected = forward(model, skip_logits=False).logits

    def unread():
        return list(forward(model).values())[1]

    assert unread().shape == expected.shape and unread().dtype == expected.dtype and unread().requires_grad
    assert type(unread().detach()) is torch.Tensor and (unread().detach().numpy() == expected.detach().numpy()).all()
    assert unread().tolist() == expected.tolist() and torch.equal(pickle.loads(pickle.dumps(unread())), expected)
    assert torch.equal(torch.stack([unread(), unread()])[1], expected) and "UnreadLogits(shape=" in repr(unread())
    assert torch.equal(next(iter(unread())), expected[0])
    assert torch.equal(pickle.loads(pickle.dumps(forward(model))).logits, expected)
    logits = unread()
    logits.retain_grad()
    logits.sum().backward()
    assert torch.equal(logits.grad, torch.ones_like(expected))


CASES = {
    "evaluation": lambda model: forward(model.eval()),
    "no gradients": lambda model: torch.no_grad()(forward)(model),
    "frozen": lambda model: forward(model.requires_grad_(False)),
    "no labels": lambda model: model(TOKENS),
    "asked for": lambda model: forward(model, skip_logits=False),
    "a hook": lambda model: (model.lm_head.register_forward_hook(lambda *_: None), forward(model))[1],
    "some": lambda model: model(TOKENS, labels=TOKENS[:, -1:], shift_labels=TOKENS[:, -1:], logits_to_keep=1),
    "a tuple": lambda model: forward(model, return_dict=False),
    "compiled": lambda model: torch.compile(model, backend="eager")(TOKENS, labels=TOKENS),
}


@pytest.mark.parametrize("case", CASES)
def test_elsewhere_logits_are_computed_at_once(case):
    output = CASES[case](make_model("linear_cpb").train())
    values = output if isinstance(output, tuple) else output.to_tuple()
    logits = [value for value in values if isinstance(value, torch.Tensor) and value.ndim == 3]
    assert len(logits) == 1 and type(logits[0]) is torch.Tensor
    assert not isinstance(output, dict) or not is_unread(output)


def test_skip_logits_of_a_call_is_that_of_the_model():
    """The Trainer passes it in evaluations with `use_liger_kernel`."""
    model = make_model("none")
    assert forward(model, skip_logits=True).logits is None and forward(model.train(), skip_logits=True).logits is None
    model.skip_logits = True
    assert forward(model).logits is None and forward(model, skip_logits=False).logits is not None


def test_a_hook_of_the_head_sees_each_step():
    model, seen = make_model("none").train(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    forward(model)
    assert seen == [(3, 20, VOCAB)]


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_data_parallel_passes_them_on_unread(options, process_group):
    model = make_model("alibi").train()
    expected = gradients(model, forward(model, skip_logits=False).loss)
    parallel = DistributedDataParallel(model, **options)
    output = forward(parallel)
    assert is_unread(output)
    output.loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert_close(forward(parallel).logits, model(TOKENS).logits)


class Outer(torch.nn.Module):
    """A module around the model, as that of a training framework."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("around", [False, True], ids=["the model", "a module around it"])
def test_sharded_weights_that_are_gone(around, process_group):
    """FSDP2 frees the weights of a forward, and reads its outputs for those that need gradients."""
    model = make_model("linear_cpb").train()
    expected = forward(model, skip_logits=False)
    expected_gradients = gradients(model, expected.loss + expected.logits.logsumexp(-1).pow(2).mean())
    sharded = Outer(model) if around else model
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    output = forward(sharded)
    assert torch.equal(output.logits, expected.logits)
    (output.loss + output.logits.logsumexp(-1).pow(2).mean()).backward()
    for parameter, gradient in zip(model.parameters(), expected_gradients, strict=True):
        assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-3, atol=1e-6)


class Reading(Trainer):
    """A trainer of a user's, with an own loss beside the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.accuracy = (outputs.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]).float().mean()
        loss = loss + 1e-4 * outputs["logits"].logsumexp(-1).pow(2).mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [Trainer, Reading])
def test_trainer_learns_the_same(trainer_class, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(8, 16)]
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    losses = []
    for skip_logits in (None, False):
        model = make_model("linear_cpb")
        model.skip_logits = skip_logits
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", **options)
        trainer = trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        predictions = trainer.predict(rows[:2]).predictions
        assert getattr(predictions, "shape", None) == (2, 16, VOCAB)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
