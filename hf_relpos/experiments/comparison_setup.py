"""What all runs of a comparison share: the text and its tokenizer, the size of the models, the flags of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.corpus import load_corpus
from ..data.tokens import PoorTextError, evaluation_documents, train_tokenizer
from ..environment import place_name
from ..evaluation.loss_by_length import evenly_spaced
from ..messages import time_text
from ..model.configuration_relpos import RelPosConfig
from ..model_corpus import opening
from ..results.training_record import passes_text
from ..tasks.arguments import DataArguments
from ..training.arguments import has_fast_bf16
from ..training.model_setup import ModelArguments, new_config
from ..training.progress import EVALUATION_SHARE
from .commands import CompareArguments
from .comparison_costs import kept_measure
from .comparison_plan import (
    AFTER,
    BEFORE,
    FEWEST_SEEDS,
    FEWEST_WINDOWS,
    MAX_PASSES,
    MOST_WINDOWS,
    START_UP,
    Cost,
    Plan,
    make_plan,
)
from .grid import Run, check_runs
from .workers import worker_kind


TOKENS_PER_STEP = 1024
SMALL = "num_hidden_layers=4,hidden_size=128,num_attention_heads=4"
TEST_SHARE = 0.08  # of the text, that the test part has at least


class Setup:
    """What all runs of a comparison share."""

    def __init__(self, args: CompareArguments, paths: dict[str, Path], num_cut: int, num_parallel: int) -> None:
        self.args, self.paths, self.num_cut, self.num_parallel = args, paths, num_cut, num_parallel
        self.device = device()
        self.batch_size = max(1, TOKENS_PER_STEP // args.train_length)
        data: dict[str, Any] = {f"{split}_file": str(path) for split, path in paths.items()}
        data |= {"held_out_ends": True} if num_cut else {}
        corpus = load_corpus(DataArguments(**data))
        self.name = place_name(args.text) if args.text else "sotu"
        num_characters = sum(map(len, corpus.splits["train"]["text"]))
        self.vocab_size = args.vocab_size or _vocab_size(num_characters)
        try:
            tokenizer = train_tokenizer(corpus, self.vocab_size)
        except PoorTextError as error:
            if args.vocab_size:
                raise
            raise ValueError(
                f"`text` {args.text!r} has few different words: they make a vocabulary of {error.most} entries, and a "
                f"text of its length is expected to make {self.vocab_size}; more text helps, or --vocab_size "
                f"{error.most}."
            ) from error
        _, documents = evaluation_documents(corpus, DataArguments(**data).filled(), tokenizer)
        rate = len(tokenizer("".join(corpus.splits["validation"]["text"][:50])[:100_000])["input_ids"])
        sample = min(100_000, sum(map(len, corpus.splits["validation"]["text"][:50])))
        self.num_characters, self.num_tokens = num_characters, int(num_characters * rate / max(1, sample))
        self.tests = [len(document) for document in documents]
        self._check_text(sum(len(text) for split in corpus.splits.values() for text in split["text"]))
        self.numbers = documents.numbers or range(len(self.tests))
        self.data, self.opening = data, opening({"test": corpus.splits["test"]})

    def _check_text(self, num_characters: int) -> None:
        """Refuses a text, of so many characters, whose test documents hold too few windows, naming the longest length
        that it serves, and how much text the one that is asked for takes."""

        def serves(length: int) -> bool:
            return sum(each // length for each in self.tests) >= FEWEST_WINDOWS and sum(
                each >= length for each in self.tests
            ) > (self.num_cut == 0)

        run_length, train_length = self.args.run_length, self.args.train_length
        if serves(run_length):
            return
        served = next((n for n in (2**k for k in range(20, 3, -1)) if n < run_length and serves(n)), 0)
        needs = f"about {self._needed(run_length)} characters would do"
        if served >= train_length:
            longest = f"the longest that it serves is {served}, {needs}"
        else:
            longest = f"it has {num_characters:,} characters in all, and {needs}"
            if run_length > train_length:
                longest += f", or {self._needed(train_length)} for --run_length {train_length}"
        raise ValueError(
            f"`run_length` {run_length}: the test part of the text holds fewer than {FEWEST_WINDOWS} windows of "
            f"so many tokens{'' if self.num_cut else ' in two documents'}; {longest}."
        )

    def _needed(self, length: int) -> str:
        """How many characters a text has whose test part serves a length, in two digits."""
        characters = FEWEST_WINDOWS * length * self.num_characters / max(1, self.num_tokens) / TEST_SHARE
        return f"{float(f'{characters:.2g}'):,.0f}"

    def lengths(self, run_length: int | None = None) -> list[int]:
        """The training length, doubled until the run length, or until another one."""
        length, found, last = self.args.train_length, [], run_length or self.args.run_length
        while length < last:
            found.append(length)
            length *= 2
        return [*found, last]

    def plan(self, budget: float, elapsed: float) -> Plan:
        """What the budget affords, of which some seconds are gone; times a few steps of each scheme."""
        costs = self.costs(self.args.schemes)
        most_steps = max(1, MAX_PASSES * self.num_tokens // (self.batch_size * self.args.train_length))
        start_up, beside = START_UP[worker_kind(self.num_parallel)], max(BEFORE, elapsed) + AFTER
        ways, num = self._ways(costs), self.num_parallel
        most_windows = min(MOST_WINDOWS, sum(length // self.args.run_length for length in self.tests))
        return make_plan(costs, budget, num, most_steps, self.args.seeds, start_up, beside, ways, most_windows)

    def costs(self, schemes: Iterable[str]) -> dict[str, Cost]:
        """What each scheme costs here."""
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.num_parallel))
        try:
            return {scheme: self._cost(scheme) for scheme in schemes}
        finally:
            torch.set_num_threads(threads)

    def _cost(self, scheme: str) -> Cost:
        sizes = self.batch_size, self.args.train_length
        root, threads = Path(self.args.output_dir), torch.get_num_threads()
        step = kept_measure(root, self._config(scheme), *sizes, self.device, self._bf16(), threads)
        return Cost(step, self._window(step, self.args.run_length))

    def _window(self, step: float, run_length: int) -> float:
        """Seconds of a window of some length in the evaluation of one run, from those of a training step."""
        readings = len(self.lengths(run_length)) + 2 * (run_length > self.args.train_length)  # twice by sliding
        tokens = run_length * readings
        return EVALUATION_SHARE * step * tokens / (self.batch_size * self.args.train_length)

    def _ways(self, costs: Mapping[str, Cost]) -> list[tuple[str, Mapping[str, Cost], int]]:
        """Flags that make a comparison cheaper, with its costs and its seeds then: one of them, or both."""
        seeds = self.args.seeds or FEWEST_SEEDS
        ways: list[tuple[str, Mapping[str, Cost], int]] = []
        for length in reversed(self.lengths()[:-1]):
            cheaper = {name: replace(cost, window=self._window(cost.step, length)) for name, cost in costs.items()}
            ways.append((f"--run_length {length}", cheaper, seeds))
        if seeds > FEWEST_SEEDS:
            few = f"--seeds {FEWEST_SEEDS}"
            both = [(f"{flags} {few}", cheaper, FEWEST_SEEDS) for flags, cheaper, _ in ways]
            ways = [(few, costs, FEWEST_SEEDS), *ways, *both]
        return ways

    def _bf16(self) -> bool:
        return has_fast_bf16(use_cpu=self.device != "cuda")

    def _config(self, scheme: str) -> RelPosConfig:
        settings = {"pos_embedding_type": scheme, "vocab_size": self.vocab_size, **self._size()}
        return new_config(ModelArguments(**settings), self.args.train_length)

    def _size(self) -> dict[str, Any]:
        size = self.args.model_size or ("xsmall" if self.device == "cuda" else None)
        overrides = "hidden_dropout=0" if size else f"{SMALL},hidden_dropout=0"
        return {"config_overrides": overrides} | ({"model_size": size} if size else {})

    def runs(self, plan: Plan, rates: dict[str, Sequence[float]], seeds: Sequence[int], tuning: bool) -> list[Run]:
        """The runs of some seeds and rates, evaluated on the validation text to choose a rate, else on the test one."""
        shared = {
            **self.data,
            **self._size(),
            "vocab_size": self.vocab_size,
            "block_size": self.args.train_length,
            "per_device_train_batch_size": self.batch_size,
            "max_steps": plan.steps,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, plan.steps // 10),
            "logging_steps": max(1, plan.steps // 40),
            "eval_steps": plan.steps,
            "save_steps": max(100, plan.steps // 4),
            "max_eval_samples": 64,
        }
        if tuning:
            evaluation = {"eval_split": "validation", "eval_lengths": [self.args.train_length], "max_windows": 400}
        else:
            evaluation = {"eval_lengths": self.lengths(), "max_windows": plan.windows}
            evaluation |= {"sliding_baseline": True} if self.args.run_length > self.args.train_length else {}
        found = []
        for seed in seeds:
            for scheme, values in rates.items():
                for rate in values:
                    settings = {**shared, "pos_embedding_type": scheme, "learning_rate": rate}
                    settings |= {"seed": seed, "data_seed": seed}
                    found.append(Run(f"{scheme}, seed {seed}, lr {rate:g}", settings, evaluation))
        check_runs(found)
        return found

    def describe(self, plan: Plan) -> str:
        """The plan in a few lines."""
        size = self.args.model_size or ("xsmall" if self.device == "cuda" else "4 layers of width 128")
        tokens = plan.steps * self.batch_size * self.args.train_length
        count, names = len(self.args.schemes), ", ".join(self.args.schemes)
        lines = [
            f"{count} scheme{'s' if count > 1 else ''} on {self.name}: {names}",
            f"models: {size}, vocabulary {self.vocab_size}, trained at {self.args.train_length} tokens, read at up to "
            f"{self.args.run_length}",
            self._describe_test(plan.windows),
            f"each run: {plan.steps} steps, {tokens:,} tokens, {passes_text(tokens / max(1, self.num_tokens))} over "
            "the training text",
            f"{plan.num_runs} runs: for each scheme 3 learning rates, the best of them with {plan.seeds} seeds",
            f"about {time_text(plan.beside + plan.seconds)} here, {self.num_parallel} at once",
        ]
        return "\n".join(lines)

    def _describe_test(self, num_windows: int) -> str:
        """What is read in the end."""
        if self.num_cut:
            cut = f"the {self.num_cut} documents are" if self.num_cut > 1 else "the document is"
            return (
                f"{cut} cut: the test is the end of texts whose beginnings are trained on, so that intervals do not "
                "hold for new documents"
            )
        length = self.args.run_length
        num_tests, num_long, num_read = _counts(self.tests, self.numbers, length, num_windows)
        text = f"test: {num_windows} windows of {length} tokens, of {num_tests} documents that are not trained on"
        if num_read == num_tests:
            return text
        reasons = []
        if short := num_tests - num_long:
            reasons.append(f"{short} shorter than the run length cannot be")
        if left := num_long - num_read:
            reasons.append(f"{left} hold none of the windows")
        return f"{text}; {num_read} of them are read: {', '.join(reasons)}"


def _vocab_size(num_characters: int) -> int:
    """A power of two that grows with the text: 512 for less than 2 MB, 8192 from 32 MB on."""
    size = 512
    while size < 8192 and size * 4000 <= num_characters:
        size *= 2
    return size


def device() -> str:
    """Where models are trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _counts(lengths: Sequence[int], numbers: Sequence[int], run_length: int, num_windows: int) -> tuple[int, int, int]:
    """How many documents there are, hold the run length, and are read in the windows that are taken of all.

    Args:
        lengths: tokens of each document, or of each piece of one.
        numbers: of the document that it belongs to.
        run_length: tokens of a window.
        num_windows: how many windows are taken.
    """
    counts = [length // run_length for length in lengths]
    owners = [number for number, count in zip(numbers, counts) for _ in range(count)]
    taken = evenly_spaced(owners, len(owners), min(num_windows, len(owners)))
    return len({*numbers}), len({*owners}), len({*taken})
