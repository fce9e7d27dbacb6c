"""The recipe: arguments and their defaults, interruption and resumption, training and finetuning."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback, TrainingArguments

from ..data.blocks import (
    BlockCollator,
    load_named_tokenizer,
    load_tokenizer,
    make_blocks,
    tokenize_split,
)
from ..data.corpus import Corpus, DataArguments, load_corpus
from ..environment import check_at_least_1, write_json
from ..hub.push import RelPosTrainer
from ..model.attention_cpu import cpu_has_fast_bf16
from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model_loading import check_vocab_size
from ..tasks.base import make_task, task_corpus
from .model_setup import (
    ModelArguments,
    SavedModelArguments,
    extend_learned_positions,
    load_saved,
    new_config,
    new_model,
)
from .record import TRAINING_RECORD, base_facts, non_default_fields, training_record
from .scheme_change import ChangeArguments, describe_changes, load_changed


TOKENS_PER_STEP = 128 * 128


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether bf16 is faster than fp32 where a run would compute: on GPUs that have it, and on CPUs with matrix units
    for it (AMX)."""
    if torch.accelerator.is_available() and not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return cpu_has_fast_bf16()


@dataclass
class RelPosTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the recipe's defaults: Adam at 2e-4, constant, clipped at 1.0, for 10,000 steps of
    16,384 tokens, with data in the same order whatever the model's seed."""

    script: ClassVar[str] = "train"
    default_steps: ClassVar[int] = 10_000
    fewest_steps: ClassVar[int] = 1

    block_size: int = field(default=128, metadata={"help": "Training length in tokens."})
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": f"Blocks per device and step; {TOKENS_PER_STEP} tokens' worth by default."}
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Blocks per device in evaluation; as in training by default."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Number of passes over the data, in place of --max_steps."}
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps, unless --num_train_epochs is given."}
    )
    data_seed: int | None = field(default=42, metadata={"help": "Seed of the order of the data, apart from --seed."})
    eval_strategy: str = "steps"
    eval_steps: float | None = 1000
    save_steps: float = 1000
    save_total_limit: int | None = 2
    logging_steps: float = 50
    prediction_loss_only: bool = True
    dataloader_drop_last: bool = True
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 21600
    hub_overwrite: bool = field(
        default=False, metadata={"help": "Let --push_to_hub replace another model that lies under the name."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Train in bf16 beside fp32 weights; by default on GPUs and CPUs that are faster with it."},
    )

    def __post_init__(self) -> None:
        self.given = non_default_fields(self)  # before defaults depend on the machine
        if self.output_dir is None:
            raise ValueError("--output_dir is required.")
        if self.block_size < 2:
            raise ValueError(f"`block_size` must be at least 2, got {self.block_size}.")
        if self.max_steps != self.fewest_steps:
            check_at_least_1("max_steps", self.max_steps)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            check_at_least_1(name, getattr(self, name))
        check_at_least_1("gradient_accumulation_steps", self.gradient_accumulation_steps)
        if self.max_steps is None:
            self.max_steps = self.default_steps if self.num_train_epochs is None else -1
        self.num_train_epochs = 1.0 if self.num_train_epochs is None else self.num_train_epochs
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
        """What is pickled beside a checkpoint: all but the token."""
        return {name: value for name, value in self.__dict__.items() if name != "given"} | {"hub_token": None}


@dataclass
class FinetuningArguments(RelPosTrainingArguments):
    """The recipe for going on at another length or with another scheme, 1000 steps by default; --block_size is the new
    length. --max_steps 0 trains nothing: the model is saved with what changes in its configuration."""

    script: ClassVar[str] = "finetune"
    default_steps: ClassVar[int] = 1000
    fewest_steps: ClassVar[int] = 0
    extend_learned_positions: bool = field(
        default=False,
        metadata={
            "help": "Lengthen a learned table to --block_size: the new rows repeat the old ones from the first on."
        },
    )


# --- interruption


class InterruptCallback(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint and stop. Once more, a second later: stop at once.

    Launchers of several processes send each worker signals of their own on top of the terminal's, so there all further
    ones are ignored; a launcher kills what does not end in its own time.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = False
        self.request_time = 0.0
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.world_size = args.world_size
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and self.world_size == 1 and time.monotonic() - self.request_time > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.request_time = True, time.monotonic()

    def _restore(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = self.requested
        if args.world_size > 1:  # all processes must stop after the same step
            flag = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag)  # a request that came meanwhile waits for the next step
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()


# --- the run


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RelPosTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains a model and saves it to `args.output_dir` with its tokenizer and `training.json`.

    Args:
        model_args, data_args, args: what scripts/train.py takes.
        callbacks: further ones for the Trainer.

    Returns:
        the record of the run, as in `training.json`.

    Raises:
        ValueError: for anything that the user can mend; nothing is written then.
        KeyboardInterrupt: after an interruption, when its checkpoint is saved.
    """
    _check_processes(args)
    checkpoint = find_checkpoint(args)
    if model_args.model_name_or_path:
        return _go_on(*load_saved(model_args, data_args), model_args, data_args, args, checkpoint, callbacks)
    config = new_config(model_args, args.block_size)
    _check_length(config, args.block_size)
    with args.main_process_first(desc="tokenizer"):
        corpus, tokenizer = _load_data(data_args, args, model_args.vocab_size)
    config.vocab_size = len(tokenizer)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, getattr(tokenizer, token))
    model = new_model(config, args.seed, model_args.attn_implementation)
    return _fit(model, tokenizer, corpus, model_args, data_args, args, checkpoint, callbacks)


def finetune(
    model_args: ChangeArguments,
    data_args: DataArguments,
    args: FinetuningArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Goes on with a saved model at `args.block_size`, with the changes that are asked for; otherwise as `train`."""
    _check_processes(args)
    checkpoint = find_checkpoint(args)
    if not model_args.model_name_or_path:
        raise ValueError("--model_name_or_path is required.")
    model, tokenizer, changes = load_changed(model_args, data_args, args.block_size, args.seed)
    limit = model.config.max_positions
    if args.extend_learned_positions:
        if limit is None:
            raise ValueError(
                "`extend_learned_positions` is for schemes with a learned table, "
                f"got {model.config.pos_embedding_type!r}."
            )
        extend_learned_positions(model, max(limit, args.block_size))
    if changes and args.process_index == 0:
        print(describe_changes(changes))
    return _go_on(model, tokenizer, model_args, data_args, args, checkpoint, callbacks, changes)


def _go_on(
    model: RelPosForCausalLM,
    tokenizer: Any,
    model_args: SavedModelArguments,
    data_args: DataArguments,
    args: RelPosTrainingArguments,
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback],
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    _check_length(model.config, args.block_size)
    with args.main_process_first(desc="corpus"):
        corpus, _ = _load_data(data_args, args, tokenizer=tokenizer)
    return _fit(model, tokenizer, corpus, model_args, data_args, args, checkpoint, callbacks, changes)


def _load_data(
    data_args: DataArguments, args: RelPosTrainingArguments, vocab_size: int | None = None, tokenizer: Any = None
) -> tuple[Corpus, Any]:
    """→ the corpus or the rows of a task, and the tokenizer that goes with them unless one is given."""
    if data_args.task is None:
        corpus = load_corpus(data_args)
        return corpus, tokenizer or load_tokenizer(data_args, corpus, vocab_size)
    if tokenizer is None and data_args.tokenizer_name:
        tokenizer = load_named_tokenizer(data_args.tokenizer_name, vocab_size)
    task = make_task(data_args.task, tokenizer)
    check_vocab_size(task.tokenizer, vocab_size or len(task.tokenizer))
    return task_corpus(task, args.block_size, args.data_seed or 0, data_args.max_eval_samples), task.tokenizer


def _fit(
    model: RelPosForCausalLM,
    tokenizer: Any,
    corpus: Corpus,
    model_args: SavedModelArguments,
    data_args: DataArguments,
    args: RelPosTrainingArguments,
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback],
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    with args.main_process_first(desc="tokenising"):
        blocks = _blocks(corpus, tokenizer, data_args, args.block_size)
    _check_batch(blocks["train"], args)
    base_length = model.config.train_length
    if args.max_steps != 0:
        model.config.train_length = args.block_size
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, args.block_size)
    if checkpoint:
        _check_checkpoint(checkpoint, model.config)
    model.skip_logits = True
    interrupt = InterruptCallback()
    try:
        trainer = RelPosTrainer(
            model=model,
            args=args,
            train_dataset=blocks["train"],
            eval_dataset=blocks["validation"],
            processing_class=tokenizer,
            data_collator=BlockCollator(),
            callbacks=[interrupt, *callbacks],
        )
    except RuntimeError as error:
        if "requires" in str(error):  # a tracker that is not installed
            raise ValueError(f"`report_to` {args.report_to} cannot be served: {error}") from error
        raise
    start = time.perf_counter()
    # the Trainer takes no steps for a number of epochs
    training_loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss if args.max_steps else None
    if interrupt.stopped:
        if trainer.is_world_process_zero():
            print(f"interrupted after step {trainer.state.global_step}; go on with --resume_from_checkpoint last")
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    first_step = int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else 0
    record = training_record(trainer, args, corpus, seconds, first_step, (model_args, data_args))
    if _last_evaluation(trainer) is None:
        trainer.evaluate()
    record |= {"train_loss": training_loss, "validation_loss": _last_evaluation(trainer)}
    record |= {"train_length": model.config.train_length, "changes": changes or None}
    if model_args.model_name_or_path:
        record |= base_facts(model_args.model_name_or_path, base_length)
    model.config.use_cache = True  # the Trainer switched it off
    trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / TRAINING_RECORD, record)  # last: what has a record is whole
    if args.push_to_hub:
        trainer.push_to_hub()  # with the card
    else:
        trainer.create_model_card()
    return record


def _last_evaluation(trainer: RelPosTrainer) -> float | None:
    """The validation loss after the last step, if it was computed."""
    state = trainer.state
    losses = [
        entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and entry["step"] == state.global_step
    ]
    return losses[-1] if losses else None


def _blocks(corpus: Corpus, tokenizer: Any, data_args: DataArguments, block_size: int) -> dict[str, Any]:
    if data_args.task is not None:
        return corpus.splits
    blocks = {}
    for split in _needed_splits(corpus):
        tokenized = tokenize_split(corpus, split, tokenizer, data_args)
        blocks[split] = make_blocks(tokenized, block_size, data_args.cross_document_attention, split)
    if data_args.max_eval_samples is not None:
        blocks["validation"] = blocks["validation"].take(data_args.max_eval_samples)
    return blocks


def _needed_splits(corpus: Corpus) -> tuple[str, str]:
    for split in ("train", "validation"):
        if split not in corpus.splits:
            raise ValueError(f"the corpus {corpus.name!r} must have a {split} split, got {list(corpus.splits)}.")
    return "train", "validation"


# --- checks before anything is written


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: `--resume_from_checkpoint last` is the newest in the output folder.

    Raises:
        ValueError: if there is none, or if the output folder holds a run that is not to be resumed.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        runs = [path.name for path in folder.glob("*") if path.name.startswith("checkpoint-") or path.suffix == ".json"]
        if runs:
            raise ValueError(
                f"`output_dir` {args.output_dir!r} already holds a run ({sorted(runs)[0]}): choose another, or go on "
                "with --resume_from_checkpoint last."
            )
        return None
    if str(wanted).lower() in ("last", "true"):
        # one that was being written when the run was killed is not whole: the state is saved last
        whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
        if not whole:
            raise ValueError(f"`resume_from_checkpoint`: {args.output_dir!r} holds no checkpoint.")
        wanted = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint` {str(wanted)!r} is no checkpoint of a run.")
    return str(wanted)


def _check_checkpoint(checkpoint: str, config: RelPosConfig) -> None:
    saved = RelPosConfig.from_pretrained(checkpoint)
    for name in (*RelPosConfig.__annotations__, "rope_parameters", "layer_types"):
        theirs, ours = getattr(saved, name, None), getattr(config, name, None)
        if theirs != ours and name != "use_cache":
            raise ValueError(f"`{name}` of the checkpoint {checkpoint!r} is {theirs!r}, got {ours!r}.")


def _check_length(config: RelPosConfig, block_size: int) -> None:
    if config.max_positions is not None and block_size > config.max_positions:
        raise ValueError(
            f"`block_size` must be at most {config.max_positions}, the rows of the learned table "
            f"(`max_position_embeddings`), got {block_size}; scripts/finetune.py --extend_learned_positions true "
            "lengthens it."
        )
    for name in ("position_start_augmentation", "position_sampling"):
        if getattr(config, name) and block_size > config.max_position_embeddings:
            raise ValueError(
                f"`block_size` must be at most `max_position_embeddings`={config.max_position_embeddings} with "
                f"`{name}`, got {block_size}."
            )


def _check_batch(blocks: Any, args: RelPosTrainingArguments) -> None:
    per_step = args.per_device_train_batch_size * max(1, args.n_gpu) * args.world_size
    if hasattr(blocks, "__len__") and len(blocks) < per_step:
        raise ValueError(
            f"`per_device_train_batch_size`: a step needs {per_step} blocks, the training split gives {len(blocks)} of "
            f"{args.block_size} tokens."
        )


def _check_processes(args: TrainingArguments) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(f"{launched} processes were launched but {args.world_size} take part; on CPUs add --use_cpu.")
