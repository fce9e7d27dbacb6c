"""What a run says: before its first step what it is and what it costs, then how far it is."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..messages import Progress
from ..results.training_record import passes_text
from .record import passes_over_corpus, repeats_rows, tokens_per_step
from .run import TrainingRun


PASSES = 10  # over its corpus, from which a run is warned
EVALUATION_SHARE = 1 / 3  # a forward takes a third of a step with as many tokens
# what is shown of a log
NUMBERS = {"loss": "loss {:.4f}", "eval_loss": "validation loss {:.4f}", "learning_rate": "learning rate {:.3g}"}
NUMBERS |= {"grad_norm": "gradient norm {:.3g}", "epoch": "epoch {:.2f}"}


class RunProgress(TrainerCallback):
    """A banner before the first step, the time that the run takes as soon as it was measured, and how far it is: a bar
    in a terminal, elsewhere lines.

    Args:
        run: of the Trainer.
        step_loss: → the loss of the last step.
        only_time: whether a callback of transformers shows how far the run is.
    """

    def __init__(self, run: TrainingRun, step_loss: Callable[[], float], only_time: bool) -> None:
        self.run, self.step_loss, self.only_time = run, step_loss, only_time
        self.progress: Progress | None = None
        self.validation: Progress | None = None
        self.step_end = 0.0  # after which an evaluation begins

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        print("\n".join(banner(self.run, state.max_steps, state.global_step)), flush=True)
        self.step_end = time.monotonic()
        self.progress = Progress(
            state.max_steps,
            "steps",
            "training",
            shorter=lambda steps: f"Ctrl-C saves a checkpoint, and a run of --max_steps {steps}",
            initial=state.global_step,
            extra=lambda seconds: seconds * self._evaluations(state),
            file=sys.stdout,
            only_time=self.only_time,
        )

    def _evaluations(self, state: Any) -> float:
        """What the evaluations that are left take, in steps."""
        args, blocks = self.run.args, self.run.data.validation
        if not hasattr(blocks, "__len__"):
            return 0.0
        steps = int(state.eval_steps or 0) if args.eval_strategy.value == "steps" else 0
        count = state.max_steps // steps - state.global_step // steps if steps else 0
        return max(1, count) * EVALUATION_SHARE * len(blocks) * args.block_size / tokens_per_step(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_end = time.monotonic()
        if self.progress:
            self.progress.update(state.global_step - self.progress.count, lambda: f"loss {self.step_loss():.3f}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.progress and has_length(eval_dataloader):
            if self.validation is None:
                options = {"file": sys.stdout, "only_time": self.only_time, "stays": False}
                self.validation = Progress(len(eval_dataloader), "batches", "validation", **options)
                self.validation.begun = self.step_end  # this is called after the first batch
            self.validation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and self.validation:
            self.progress.leave_out(time.monotonic() - self.validation.begun)
            self.validation.close()
        self.validation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        words = [text.format(float(logs[name])) for name, text in NUMBERS.items() if name in (logs or {})]
        if self.progress and not self.only_time and {"loss", "eval_loss"} & logs.keys():
            left = [self.progress.left()] if self.progress.left() else []
            self.progress.write(f"step {state.global_step:,}/{state.max_steps:,}: " + ", ".join([*words, *left]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.close()


def banner(run: TrainingRun, num_steps: int, first_step: int = 0) -> list[str]:
    """A few lines about a run, before its first step.

    Args:
        run: of any kind.
        num_steps: of the whole run.
        first_step: the step that it resumes after, or 0.
    """
    args, config, per_step = run.args, run.model.config, tokens_per_step(run.args)
    devices = max(1, args.n_gpu) * args.world_size
    batch = [f"{args.per_device_train_batch_size} × {args.block_size} tokens"]
    batch += [f"{devices} devices"] if devices > 1 else []
    batch += [f"{args.gradient_accumulation_steps} accumulated"] if args.gradient_accumulation_steps > 1 else []
    resumed = f"resumes after step {first_step:,}: " if first_step else ""
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    tokens = f"{count_text(num_steps * per_step)} tokens, {_passes_text(run, num_steps)}"
    lines = [
        f"{resumed}{config.pos_embedding_type}, {count_text(run.model.num_parameters())} parameters, trained at "
        f"{args.block_size:,} tokens, seed {args.seed}",
        f"{num_steps:,} steps of {' × '.join(batch)}: {tokens}",
        f"on {_device_text(args)}, in {dtype}; output: {args.output_dir}",
    ]
    longest = run.data.longest_document
    if longest is not None and longest < args.block_size:
        lines.append(
            f"warning: no document has {args.block_size:,} tokens, the longest has {longest:,}: nothing is learned of "
            f"longer contexts; --block_size {longest} is as much, or --cross_document_attention true joins documents"
        )
    if not first_step and run.model_args.model_name_or_path and repeats_rows(run):
        lines.append(
            "note: these are the rows of the model's own training, in the same order, so its first ones are read "
            f"again; another --data_seed than {args.data_seed} begins with others"
        )
    passes = passes_over_corpus(run, num_steps)
    if passes is not None and passes > PASSES:
        steps = int(num_steps * PASSES / passes)
        less = f"--max_steps {steps} reads it {PASSES} times" if steps else "it takes more text"
        lines.append(
            f"warning: {passes:.0f} passes over one corpus: after some {PASSES} a model learns it by heart; {less}"
        )
    return lines


def _passes_text(run: TrainingRun, num_steps: int) -> str:
    passes, name = passes_over_corpus(run, num_steps), run.data.corpus.record["name"]
    if passes is None:
        return f"streamed from {name}"
    if run.data_args.task is not None:
        return f"rows of {name}" + (", none twice" if passes <= 1 else "")
    return f"{passes_text(passes)} over the {count_text(len(run.data.train) * run.args.block_size)} of {name}"


def _device_text(args: Any) -> str:
    if args.device.type == "cpu":
        count = torch.get_num_threads()
        return f"the CPU ({count} thread{'s' if count > 1 else ''})"
    return torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type


def count_text(number: int) -> str:
    """A large number in about three digits: "7.34M"."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return (f"{number / size:.0f}" if number >= 100 * size else f"{number / size:.3g}") + letter
    return str(number)
