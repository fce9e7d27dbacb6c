"""One command from a text to an answer: which position scheme trains best on it, and which goes on past its length."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..cli import say_next
from ..data.corpus import load_corpus
from ..data.files import LEFT_OUT
from ..data.tokens import PoorTextError, evaluation_documents, train_tokenizer
from ..environment import check_at_least_1
from ..messages import time_text
from ..model.configuration_relpos import RelPosConfig
from ..model.scheme_registry import position_embedding_classes
from ..model_corpus import opening
from ..processes import only_owner
from ..results.caveats import caveats
from ..results.compared_rates import save_tried
from ..results.groups import group_results
from ..results.questions import answers, sentences
from ..results.report import write_report
from ..results.result_file import best_result, read_result
from ..scheme_check import check_imported
from ..tasks.arguments import DataArguments
from ..training.arguments import has_fast_bf16
from ..training.model_setup import ModelArguments, new_config
from ..training.progress import EVALUATION_SHARE
from .commands import CompareArguments
from .comparison_plan import MAX_PASSES, START_UP, Cost, Plan, make_plan, measure, parse_budget, read_plan, save_plan
from .comparison_progress import ComparisonProgress
from .comparison_text import num_cut, prepare_text
from .grid import Run, check_runs
from .progress import FAILURE, failure_of, live_table, status
from .sweep import collect_results, run_one, signals_interrupt
from .workers import default_num_parallel, run_here, run_in_processes, worker_kind


TOKENS_PER_STEP = 1024
RATES = (3e-3, 6e-3)  # tried first; then half or twice the better one
SEEDS = (42, 1337, 3407, 1024, 365)
SMALL = "num_hidden_layers=4,hidden_size=128,num_attention_heads=4"
LONGER = 10  # times as many steps has the run that is offered at the end
NOT_LONGER = ("logging_steps", "eval_steps", "save_steps", "max_eval_samples")  # of its flags, which suit a short one
MIN_WINDOWS, MAX_WINDOWS = 8, 48  # of the run length, that are read


def compare(args: CompareArguments) -> list[str]:
    """Trains and evaluates what the budget affords, writes the report and prints the answer; → its sentences.

    Raises:
        ValueError: for schemes that cannot be read at the run length, a text that is too short for it, a budget that
            affords no comparison; nothing is trained then.
    """
    budget = parse_budget(args.budget)
    _check(args)
    root = Path(args.output_dir)
    with signals_interrupt():
        with only_owner(root, seconds=-1):  # another call may be making the plan
            asked = {name: getattr(args, name) for name in ASKED} | {"device": _device()}
            num_parallel = args.num_parallel or default_num_parallel([])
            plan, news = read_plan(root, asked, num_parallel)
            paths = prepare_text(args.text, root / "text", args.run_length)
            setup = _Setup(args, paths, num_cut(root / "text"), num_parallel)
            plan = plan or setup.plan(budget)
            if not args.dry_run:
                save_plan(root, asked, plan)
        print("\n".join(filter(None, [setup.describe(plan), news])), flush=True)
        if args.dry_run:
            return []
        progress = ComparisonProgress(plan, budget, num_parallel)
        final = _train_all(args, setup, plan, root, progress)
    with only_owner(root, seconds=-1):
        results = collect_results(final, root)
        written = write_report(results, root / "report", title=f"Position schemes on {setup.name}", varied=VARIED)
    groups = group_results(results, VARIED)
    found = [line for answer in answers(groups) for line in sentences(answer)] + caveats(groups)
    print("\n".join(["", *(line.replace("**", "") for line in found), ""]))
    print("\n".join([*filter(None, [progress.conclusion()]), f"wrote {written[1]}"]))
    best = best_result(results)["model"]
    _say_what_next(next(run for run in final if run.key == best), setup, root)
    return found


def _say_what_next(best: Run, setup: "_Setup", root: Path) -> None:
    """How to see what the best model writes, and how to train a model by its recipe for ten times as many steps."""
    say_next("generate", model_name_or_path=best.folder(root), prompt=setup.opening or "The")
    flags = {name: value for name, value in best.settings.items() if name not in NOT_LONGER}
    flags |= {name: LONGER * flags[name] for name in ("max_steps", "warmup_steps")}
    flags = {name: str(value).lower() if isinstance(value, bool) else value for name, value in flags.items()}
    say_next("train", **flags, output_dir=root / "longer")


VARIED = ("recipe.learning_rate",)
# what the plan depends on, besides the text
ASKED = ("schemes", "train_length", "run_length", "budget", "seeds", "model_size", "vocab_size")


def _train_all(
    args: CompareArguments, setup: "_Setup", plan: Plan, root: Path, progress: ComparisonProgress
) -> list[Run]:
    """Chooses a learning rate for each scheme and trains its seeds with it; → the runs of all seeds."""
    first = setup.runs(plan, {scheme: RATES for scheme in args.schemes}, SEEDS[:1], tuning=True)
    _do(first, root, setup.num_parallel, progress, may_diverge=True)
    rates = {scheme: [_next_rate(first, scheme, root)] for scheme in args.schemes}
    second = setup.runs(plan, rates, SEEDS[:1], tuning=True)
    _do(second, root, setup.num_parallel, progress, may_diverge=True)
    chosen = {scheme: _best_rate([*first, *second], scheme, root) for scheme in args.schemes}
    save_tried(root, {scheme: _tried([*first, *second], scheme, root) for scheme in args.schemes})
    print("learning rates by validation loss: " + ", ".join(f"{name} {rate:g}" for name, rate in chosen.items()))
    rates = {scheme: [rate] for scheme, rate in chosen.items()}
    final = setup.runs(plan, rates, SEEDS[: plan.seeds], tuning=False)
    _do(final, root, setup.num_parallel, progress)
    return final


def _check(args: CompareArguments) -> None:
    """Refuses what would be found out after the training."""
    if len({*args.schemes}) != len(args.schemes) or not args.schemes:
        raise ValueError(f"`schemes` must name each scheme once, got {args.schemes}.")
    for name in ("train_length", "run_length"):
        if getattr(args, name) < 16:
            raise ValueError(f"`{name}` must be at least 16 tokens, got {getattr(args, name)}.")
    if args.run_length < args.train_length:
        raise ValueError(f"`run_length` must be at least `train_length` {args.train_length}, got {args.run_length}.")
    check_at_least_1("num_parallel", args.num_parallel)
    _check_places(args)
    if args.seeds is not None and not 2 <= args.seeds <= len(SEEDS):
        raise ValueError(f"`seeds` must lie between 2 and {len(SEEDS)}, got {args.seeds}.")
    for scheme in args.schemes:
        try:
            classes = position_embedding_classes(scheme).values()
            check_imported(RelPosConfig(pos_embedding_type=scheme))
        except ValueError as error:  # which names the field of a model
            raise ValueError(f"`schemes` {scheme!r}: {error}") from error
        if args.run_length > args.train_length and any(cls.has_position_limit for cls in classes):
            raise ValueError(
                f"`schemes`: {scheme!r} has no positions past `train_length` {args.train_length}: leave it out, or "
                f"compare at --run_length {args.train_length}."
            )


def _check_places(args: CompareArguments) -> None:
    """Refuses to write into the text, of which the next call would read what this one wrote."""
    if args.text is None:
        return
    if not os.path.exists(os.path.expanduser(args.text)):
        raise ValueError(f"`text` {args.text!r} does not exist.")
    text, root = (Path(os.path.realpath(os.path.expanduser(place))) for place in (args.text, args.output_dir))
    if root.is_relative_to(text) and not any(map(LEFT_OUT.search, root.relative_to(text).parts)):
        raise ValueError(
            f"`output_dir` {args.output_dir!r} lies in the folder of the `text`, {args.text!r}: choose another."
        )


def _do(
    runs: Sequence[Run], root: Path, num_parallel: int, progress: ComparisonProgress, may_diverge: bool = False
) -> None:
    """Does runs, or what is left of them.

    Args:
        runs, root, num_parallel: which, where, and how many at once.
        progress: of all stages, of which these runs are the next.
        may_diverge: whether a run may end with a loss that is not finite, as one that tries a learning rate.

    Raises:
        ValueError: if one fails.
    """
    progress.begin(runs, root)
    todo = [run for run in runs if status(run, root)["state"] != "done"]
    if not todo:
        return progress.end(runs)
    names = {run: run.place for run in runs}
    with live_table(runs, root, summary=progress.summary, remark=progress.remark, names=names):
        if num_parallel == 1:
            failed = run_here(todo, root, run_one)
        else:
            failed = run_in_processes(todo, root, run_one, num_parallel)
    progress.end(runs)
    failed = [run for run in failed if not (may_diverge and _diverged(run, root))]
    if failed:
        raise ValueError(f"the run {failed[0].place!r} failed: {failure_of(failed[0], root) or 'see above'}.")


def _diverged(run: Run, root: Path) -> bool:
    path = run.folder(root) / FAILURE
    return path.is_file() and "ValueError: training stopped: " in path.read_text(encoding="utf-8")


def _validation_losses(runs: Sequence[Run], scheme: str, root: Path) -> dict[float, float]:
    """Learning rate → loss, lowest first, of the runs that came to their end."""
    found = {}
    for run in runs:
        if run.settings["pos_embedding_type"] == scheme and run.result(root).is_file():
            (cell,) = read_result(run.result(root))["lengths"].values()
            found[run.settings["learning_rate"]] = cell["loss"]
    if not found:
        raise ValueError(f"`schemes`: the training of {scheme!r} diverges at each of the learning rates {RATES}.")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _tried(runs: Sequence[Run], scheme: str, root: Path) -> dict[float, float | None]:
    """Learning rate → validation loss, `None` where the training diverged."""
    own = [run.settings["learning_rate"] for run in runs if run.settings["pos_embedding_type"] == scheme]
    return dict.fromkeys(own) | _validation_losses(runs, scheme, root)


def _next_rate(runs: Sequence[Run], scheme: str, root: Path) -> float:
    """The rate beyond the better of the first two."""
    best = _best_rate(runs, scheme, root)
    return best / 2 if best == min(RATES) else best * 2


def _best_rate(runs: Sequence[Run], scheme: str, root: Path) -> float:
    return next(iter(_validation_losses(runs, scheme, root)))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Setup:
    """What all runs of a comparison share."""

    def __init__(self, args: CompareArguments, paths: dict[str, Path], num_cut: int, num_parallel: int) -> None:
        self.args, self.paths, self.num_cut, self.num_parallel = args, paths, num_cut, num_parallel
        self.device = _device()
        self.batch_size = max(1, TOKENS_PER_STEP // args.train_length)
        data: dict[str, Any] = {f"{split}_file": str(path) for split, path in paths.items()}
        data |= {"held_out_ends": True} if num_cut else {}
        corpus = load_corpus(DataArguments(**data))
        self.name = Path(args.text).name if args.text else "sotu"
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
        lengths = sorted((len(document) for document in documents), reverse=True)
        self._check_text(lengths)
        self.num_tests, self.num_long = len(lengths), sum(length >= args.run_length for length in lengths)
        rate = len(tokenizer("".join(corpus.splits["validation"]["text"][:50])[:100_000])["input_ids"])
        sample = min(100_000, sum(map(len, corpus.splits["validation"]["text"][:50])))
        self.num_tokens = int(num_characters * rate / max(1, sample))
        self.windows = min(MAX_WINDOWS, sum(length // args.run_length for length in lengths))
        self.data, self.opening = data, opening({"test": corpus.splits["test"]})

    def _check_text(self, lengths: Sequence[int]) -> None:
        """Refuses a text whose test documents hold too few windows, naming the longest length that it serves."""

        def serves(length: int) -> bool:
            return sum(each // length for each in lengths) >= MIN_WINDOWS and sum(
                each >= length for each in lengths
            ) > (self.num_cut == 0)

        if serves(self.args.run_length):
            return
        served = next((n for n in (2**k for k in range(20, 3, -1)) if n < self.args.run_length and serves(n)), None)
        longest = f"the longest that it serves is {served}" if served else "it is too short for any comparison"
        raise ValueError(
            f"`run_length` {self.args.run_length}: the test part of the text holds fewer than {MIN_WINDOWS} windows of "
            f"so many tokens{'' if self.num_cut else ' in two documents'}; {longest}."
        )

    def lengths(self) -> list[int]:
        """The training length, doubled until the run length."""
        length, found = self.args.train_length, []
        while length < self.args.run_length:
            found.append(length)
            length *= 2
        return [*found, self.args.run_length]

    def plan(self, budget: float) -> Plan:
        """What the budget affords; times a few steps of each scheme."""
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.num_parallel))
        try:
            costs = {scheme: self._cost(scheme) for scheme in self.args.schemes}
        finally:
            torch.set_num_threads(threads)
        most_steps = max(1, MAX_PASSES * self.num_tokens // (self.batch_size * self.args.train_length))
        start_up = START_UP[worker_kind(self.num_parallel)]
        return make_plan(costs, budget, self.num_parallel, most_steps, self.args.seeds, start_up)

    def _cost(self, scheme: str) -> Cost:
        step = measure(self._config(scheme), self.batch_size, self.args.train_length, self.device, self._bf16())
        readings = len(self.lengths()) + 2  # the sliding baseline reads each token twice
        tokens = self.windows * self.args.run_length * readings
        return Cost(step, EVALUATION_SHARE * step * tokens / (self.batch_size * self.args.train_length))

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
            evaluation = {"eval_lengths": self.lengths(), "max_windows": self.windows}
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
        lines = [
            f"{len(self.args.schemes)} schemes on {self.name}: {', '.join(self.args.schemes)}",
            f"models: {size}, vocabulary {self.vocab_size}, trained at {self.args.train_length} tokens, read at up to "
            f"{self.args.run_length}",
            self._describe_test(),
            f"each run: {plan.steps} steps, {tokens:,} tokens, {tokens / max(1, self.num_tokens):.1f} passes over the "
            "training text",
            f"{plan.num_runs} runs: for each scheme 3 learning rates, the best of them with {plan.seeds} seeds",
            f"about {time_text(plan.seconds)} here, {self.num_parallel} at once",
        ]
        return "\n".join(lines)

    def _describe_test(self) -> str:
        """What is read in the end."""
        if self.num_cut:
            cut = f"the {self.num_cut} documents are" if self.num_cut > 1 else "the document is"
            return (
                f"{cut} cut: the test is the end of texts whose beginnings are trained on, so that intervals do not "
                "hold for new documents"
            )
        short = self.num_tests - self.num_long
        left = f"; {short} shorter than {self.args.run_length} tokens cannot be read at that length" if short else ""
        return f"test: {self.num_tests} documents that are not trained on{left}"


def _vocab_size(num_characters: int) -> int:
    """A power of two that grows with the text: 512 for less than 2 MB, 8192 from 32 MB on."""
    size = 512
    while size < 8192 and size * 4000 <= num_characters:
        size *= 2
    return size
