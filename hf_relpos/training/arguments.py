"""The recipe: training arguments and their defaults."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments

from ..environment import check_at_least_1
from ..results.training_record import non_default_fields


TOKENS_PER_STEP = 128 * 128
SCHEDULES = ("at_once", "by_layer")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of saved weights
# title → names of the flags that transformers has
PURPOSES = {
    "optimizer and schedule": "optim.*|adam.*|weight_.*|max_grad_norm|lr_.*|warmup.*|label_smoothing.*|neftune.*|seed",
    "precision, memory and speed": "fp16.*|bf16.*|tf32|.*checkpointing.*|torch_.*|use_liger.*|liger_.*|use_cache|"
    "auto_find.*|full_determinism|use_cpu|gradient_acc.*|average_tokens.*",
    "logs and trackers": "log.*|disable_tqdm|report_to|run_name|project|trackio.*|include_num.*|skip_memory.*|debug",
    "evaluation while training": "eval.*|do_.*|prediction_.*|include_for.*|batch_eval.*|.*best_model.*|greater_is.*",
    "checkpoints": "save_.*|resume_.*|restore_.*|enable_jit.*|ignore_data_skip",
    "the Hub": "hub_.*|push_.*",
    "data loading": "dataloader.*|remove_unused.*|label_names|train_sampling.*|length_column.*|group_by.*",
    "several processes": "ddp.*|fsdp.*|deepspeed|accelerator.*|parallelism.*|local_rank",
}


def check_peft() -> None:
    """Raises `ValueError` where PEFT is not installed."""
    if find_spec("peft") is None:
        raise ValueError("`lora_rank` needs the package peft: pip install 'hf_relpos[lora]'.")


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU has matrix units for bf16."""
    from ..model.attention_cpu import cpu_has_fast_bf16 as has_units  # imports the models, which --help need not do

    return has_units()


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether bf16 is faster than fp32 where a run would compute: on GPUs that have it, and on CPUs with matrix units
    for it (AMX)."""
    if torch.accelerator.is_available() and not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_fast_bf16()


@dataclass
class RelPosTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the recipe's defaults: Adam at 2e-4, constant, clipped at 1.0, for 10,000 steps of
    16,384 tokens, with data in an order that does not depend on the model's seed."""

    about: ClassVar[str] = "the training"
    purposes: ClassVar[dict[str, str]] = PURPOSES
    script: ClassVar[str] = "train"
    default_steps: ClassVar[int] = 10_000
    fewest_steps: ClassVar[int] = 1

    block_size: int = field(default=128, metadata={"help": "Training length in tokens."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the model, its record and its checkpoints; a new one."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Of the optimizer; the highest of the schedule."})
    lr_scheduler_type: str = field(default="constant", metadata={"choices": [each.value for each in SchedulerType]})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": f"Blocks per device and step; {TOKENS_PER_STEP} tokens' worth by default."}
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Blocks per device in evaluation; as in training by default."}
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={"help": "Number of passes over the data, instead of --max_steps, which holds without it."},
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps, unless --num_train_epochs is given: 10,000 by default, 1,000 by finetune; -1: "
            "that many epochs, 3 by default."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the weights and of dropout."})
    data_seed: int | None = field(
        default=None, metadata={"help": "Seed of the order of the data; that of --seed by default."}
    )
    eval_strategy: str = field(default="steps", metadata={"choices": [each.value for each in IntervalStrategy]})
    eval_steps: float | None = 1000
    save_steps: float = 1000
    save_total_limit: int | None = 2
    logging_steps: float = 50
    prediction_loss_only: bool = True
    dataloader_drop_last: bool = True
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 21600
    save_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights that are saved at the end: float32, bfloat16 or float16; by default that of "
            "the saved model that is continued. Training and its checkpoints have fp32 weights."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "last: go on from the newest whole checkpoint of --output_dir; or the folder of one."},
    )
    override_recipe: bool = field(
        default=False,
        metadata={"help": "Resume with a recipe that differs, as a larger --max_steps; the change is recorded."},
    )
    hub_overwrite: bool = field(
        default=False, metadata={"help": "Let --push_to_hub replace another model of the same name."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bf16 with fp32 weights; by default on GPUs and CPUs where that is faster."},
    )

    def __post_init__(self) -> None:
        self.given = non_default_fields(self)  # before defaults depend on the machine
        if self.output_dir is None:
            raise ValueError("--output_dir is required.")
        if self.block_size < 2:
            raise ValueError(f"`block_size` must be at least 2, got {self.block_size}.")
        if self.metric_for_best_model not in (None, "loss", "eval_loss"):  # else found out after the first evaluation
            raise ValueError(f"`metric_for_best_model` must be loss or eval_loss, got {self.metric_for_best_model!r}.")
        if self.max_steps not in (self.fewest_steps, -1):
            check_at_least_1("max_steps", self.max_steps)
        if self.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel` must be false: Liger has no kernels for these models, which compute their loss "
                "without logits as they are; got true."
            )
        if self.save_dtype not in (None, *DTYPES):
            raise ValueError(f"`save_dtype` must be one of {[*DTYPES]}, got {self.save_dtype!r}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            check_at_least_1(name, getattr(self, name))
        check_at_least_1("gradient_accumulation_steps", self.gradient_accumulation_steps)
        if self.max_steps is None:
            self.max_steps = self.default_steps if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = TrainingArguments.num_train_epochs if self.max_steps == -1 else 1.0
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = max(1, TOKENS_PER_STEP // self.block_size)
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bf16(self.use_cpu)
            self.use_cpu = self.use_cpu or (self.bf16 and not torch.accelerator.is_available())
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()  # it warns otherwise
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled with a checkpoint: all but the token."""
        return {name: value for name, value in self.__dict__.items() if name != "given"} | {"hub_token": None}


@dataclass
class FinetuningArguments(RelPosTrainingArguments):
    """The recipe for finetuning at another length or with another scheme, 1000 steps by default; --block_size is the
    new length. With --max_steps 0 nothing is trained: the model is saved with its changed configuration."""

    script: ClassVar[str] = "finetune"
    default_steps: ClassVar[int] = 1000
    fewest_steps: ClassVar[int] = 0
    extend_learned_positions: bool = field(
        default=False,
        metadata={
            "help": "Lengthen a learned table to --block_size: the new rows repeat the old ones from the first on."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA of this rank beside the matrices of attention and MLP, and the parameters of the "
            "position scheme, instead of all weights; it is merged where the model is saved. Needs the package peft."
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "LoRA is multiplied by alpha / rank; twice the rank by default."}
    )
    scheme_schedule: str = field(
        default="at_once",
        metadata={
            "choices": [*SCHEDULES],
            "help": "How another --pos_embedding_type comes: at_once, before the first step, or by_layer, from the "
            "last layer to the first over --scheme_schedule_steps. Needs --max_steps.",
        },
    )
    scheme_schedule_steps: int | None = field(
        default=None,
        metadata={"help": "Steps until a scheme that comes by_layer is in all layers; half of all by default."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is None and self.lora_alpha is not None:
            raise ValueError(f"`lora_alpha` needs `lora_rank`, got {self.lora_alpha} alone.")
        if self.scheme_schedule not in SCHEDULES:
            raise ValueError(f"`scheme_schedule` must be one of {[*SCHEDULES]}, got {self.scheme_schedule!r}.")
        if self.scheme_schedule == "at_once" and self.scheme_schedule_steps is not None:
            raise ValueError(
                f"`scheme_schedule_steps` is for 'by_layer', got {self.scheme_schedule_steps} with 'at_once'."
            )
        check_at_least_1("scheme_schedule_steps", self.scheme_schedule_steps)
        if self.lora_rank is not None:
            check_at_least_1("lora_rank", self.lora_rank)
            self._check_lora()

    def _check_lora(self) -> None:
        self.lora_alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"`lora_alpha` must be a number above 0, got {self.lora_alpha}.")
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name):
                raise ValueError(f"`lora_rank` must be None with `{name}`, got {self.lora_rank}.")
        check_peft()
