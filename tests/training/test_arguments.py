"""The recipe's defaults, and the flags that users know."""

import pytest
import torch

from hf_relpos.tasks.arguments import DataArguments
from hf_relpos.training import arguments
from hf_relpos.training.arguments import RelPosTrainingArguments
from hf_relpos.training.model_setup import ModelArguments


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the default is the GPU's")
@pytest.mark.parametrize("has_matrix_units", [True, False])
def test_bf16_is_the_default_where_it_is_faster(has_matrix_units, monkeypatch):
    monkeypatch.setattr(arguments, "cpu_has_fast_bf16", lambda: has_matrix_units)
    args = RelPosTrainingArguments(output_dir="x")
    assert args.bf16 == args.use_cpu == has_matrix_units
    assert not RelPosTrainingArguments(output_dir="x", bf16=False).bf16
    assert RelPosTrainingArguments(output_dir="x", bf16=True, use_cpu=True).bf16


def test_bf16_by_emulation_is_no_reason_to_take_it(monkeypatch):
    """As on GPUs of before 2020, where it is slower than fp32."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not arguments.has_fast_bf16(use_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert arguments.has_fast_bf16(use_cpu=False)


def test_the_recipe_is_the_notebooks(tmp_path):
    args = RelPosTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, str(args.lr_scheduler_type.value), args.max_grad_norm) == (2e-4, "constant", 1.0)
    assert (args.max_steps, args.per_device_train_batch_size, args.block_size) == (10_000, 128, 128)
    assert (args.weight_decay, args.seed, args.data_seed, args.prediction_loss_only) == (0.0, 42, 42, True)
    assert RelPosTrainingArguments(output_dir="x", block_size=2048, use_cpu=True).per_device_train_batch_size == 8
    assert RelPosTrainingArguments(output_dir="x", num_train_epochs=2, use_cpu=True).max_steps == -1


def test_steps_of_minus_one_are_epochs():
    """As in transformers, where it is the default."""
    args = RelPosTrainingArguments(output_dir="x", max_steps=-1, use_cpu=True)
    assert (args.max_steps, args.num_train_epochs) == (-1, 3.0)
    args = RelPosTrainingArguments(output_dir="x", max_steps=-1, num_train_epochs=2, use_cpu=True)
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_steps": -2}, "`max_steps` must be at least 1, got -2."),
        ({"use_liger_kernel": True}, "`use_liger_kernel` must be false: Liger has no kernels for these models"),
    ],
    ids=["steps", "Liger"],
)
def test_what_cannot_be_served_is_refused(options, message):
    with pytest.raises(ValueError) as refused:
        RelPosTrainingArguments(output_dir="x", use_cpu=True, **options)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_arguments_are_the_ones_that_users_know():
    names = {
        name for cls in (ModelArguments, DataArguments, RelPosTrainingArguments) for name in cls.__dataclass_fields__
    }
    known = (
        "model_name_or_path block_size output_dir dataset_name dataset_config_name train_file validation_file streaming"
    )
    known += " tokenizer_name config_overrides preprocessing_num_workers validation_split_percentage learning_rate"
    assert set(known.split()) <= names
