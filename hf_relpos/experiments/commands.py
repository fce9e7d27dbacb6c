"""`hf-relpos sweep` and `hf-relpos compare`: their flags. The rest is imported when the flags were read, so that
`--help` does not wait for it."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from ..cli import command, parse_arguments
from ..processes import seconds_of_start


SWEEP_DESCRIPTION = """\
Runs the experiment that a YAML file states, and continues where an earlier call stopped. A small file is

  train: {train_file: my.txt, vocab_size: 2048, max_steps: 500, learning_rate: 3e-3}
  grid:
    pos_embedding_type: [rotary, alibi]
    seed: [1, 2, 3]
  evaluate: {eval_lengths: [128, 512]}

hf-relpos sweep --experiment experiment.yaml --output_dir output/experiment
"""
COMPARE_DESCRIPTION = """\
Compares position schemes on a text: a learning rate for each by validation loss, several seeds, and the answer with
what is resolved and what is not. Called again with the same --output_dir it goes on where it was stopped, and it takes
more seeds, a larger budget or more schemes: what is done is kept, and new runs have as many steps as the others.

hf-relpos compare --text my_texts/ --schemes rotary alibi linear_cpb --train_length 128 --run_length 2048 --budget 20min
"""


@dataclass
class SweepArguments:
    """Which experiment, where its runs go, and how many run at once."""

    experiment: str = field(metadata={"help": "YAML file with the sections train, grid, finetune and evaluate."})
    output_dir: str = field(metadata={"help": "Folder of the runs; those that are done are not repeated."})
    scale: float = field(
        default=1.0,
        metadata={"help": "Factor of the numbers of steps, of evaluation windows and of validation samples."},
    )
    num_parallel: int | None = field(
        default=None,
        metadata={
            "help": "Runs at once, each in its own process; GPUs are used in turn. By default one on each GPU; on a "
            "CPU one a core, up to four, if all models are below 10M weights, else one."
        },
    )
    executor: str = field(
        default="local", metadata={"help": "local, or ray: a task for each run on a Ray cluster (extra [ray])."}
    )
    cpus_per_run: float = field(default=1, metadata={"help": "CPUs that a run takes of a Ray cluster."})
    gpus_per_run: float = field(default=0, metadata={"help": "GPUs that a run takes of a Ray cluster."})
    dry_run: bool = field(default=False, metadata={"help": "Print the runs and start none."})


@dataclass
class CompareArguments:
    """Which schemes, on which text, and how long it may take."""

    text: str | None = field(
        default=None,
        metadata={
            "help": "A file or folder of text (txt, jsonl, parquet, csv, or plain text of any suffix); a built-in one "
            "by default."
        },
    )
    schemes: list[str] = field(
        default_factory=lambda: ["rotary", "alibi", "linear_cpb"],
        metadata={"help": "Position schemes, separated by spaces; `hf-relpos schemes` lists them."},
    )
    train_length: int = field(default=128, metadata={"help": "Length in tokens that the models are trained at."})
    run_length: int = field(default=2048, metadata={"help": "Length in tokens that they shall be good at."})
    budget: str = field(
        default="20min",
        metadata={
            "help": "Time that all may take, over all calls that go on with it: 20min, 90s, 2h. On a machine that "
            "becomes slower fewer steps, or fewer seeds, are trained; what is added later may take more."
        },
    )
    output_dir: str = field(default="output/compare", metadata={"help": "Folder of the runs and the report."})
    seeds: int | None = field(
        default=None, metadata={"help": "Seeds of each scheme, 2 to 5; as the budget allows by default."}
    )
    model_size: str | None = field(
        default=None, metadata={"help": "xsmall, small, ..; by default 4 layers of width 128, and xsmall on a GPU."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Entries of the tokenizer, which is trained on the text; by its size by default."},
    )
    num_parallel: int | None = field(
        default=None,
        metadata={"help": "Runs at once; by default one for each GPU, or for each thread of torch, up to 4."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and what it costs, and start nothing."})


@command
def sweep_main() -> None:
    """The command line of `hf-relpos sweep`."""
    (args,) = parse_arguments((SweepArguments,), SWEEP_DESCRIPTION)
    from .sweep import sweep

    with _resumable():
        sweep(args)


@command
def compare_main() -> None:
    """The command line of `hf-relpos compare`."""
    begun = time.time() - seconds_of_start()
    (args,) = parse_arguments((CompareArguments,), COMPARE_DESCRIPTION)
    from .compare import compare

    with _resumable():
        compare(args, begun)


@contextmanager
def _resumable() -> Iterator[None]:
    """An interrupt says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be closed
            print(f"interrupted; what is done is kept. To go on:\n{shlex.join(sys.orig_argv)}", file=sys.stderr)
        raise
