"""One command from a text to an answer: which position scheme trains best on it, and which goes on past its length."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..cli import command_words, say_next
from ..data.files import LEFT_OUT
from ..environment import check_at_least_1
from ..model.configuration_relpos import RelPosConfig
from ..model.scheme_registry import position_embedding_classes
from ..processes import only_owner
from ..results.caveats import caveats
from ..results.compared_rates import edge_text, save_tried
from ..results.groups import group_results
from ..results.questions import answers, sentences
from ..results.report import write_report
from ..results.result_file import best_result, read_result
from ..scheme_check import check_imported
from .commands import CompareArguments
from .comparison_clock import Clock
from .comparison_plan import FEWEST_SEEDS, Plan, as_first_spelt, parse_budget, read_plan, save_plan
from .comparison_progress import ComparisonProgress, PlanChanged
from .comparison_setup import Setup, device
from .comparison_text import num_cut, prepare_text
from .grid import Run
from .progress import FAILURE, failure_of, live_table, status
from .sweep import collect_results, run_one, signals_interrupt
from .workers import default_num_parallel, run_here, run_in_processes


RATES = (3e-3, 6e-3)  # tried first; then half or twice the better one
SEEDS = (42, 1337, 3407, 1024, 365)
LONGER = 10  # times as many steps has the run that is offered at the end
NOT_LONGER = ("logging_steps", "eval_steps", "save_steps", "max_eval_samples")  # of its flags, which suit a short one
VARIED = ("recipe.learning_rate",)
# what the plan depends on, besides the text
ASKED = ("schemes", "train_length", "run_length", "budget", "seeds", "model_size", "vocab_size")


def compare(args: CompareArguments, begun: float | None = None) -> list[str]:
    """Trains and evaluates what the budget affords, writes the report and prints the answer; → its sentences.

    Args:
        args: which schemes, on which text, and how long it may take.
        begun: when the call began, in seconds of the epoch, which the budget counts from; now by default.

    Raises:
        ValueError: for schemes that cannot be read at the run length, a text that is too short for it, a budget that
            affords no comparison; nothing is trained then.
    """
    budget = parse_budget(args.budget)
    _check(args)
    root = as_first_spelt(Path(args.output_dir))
    args = replace(args, output_dir=str(root))
    clock = Clock(root, begun)
    with signals_interrupt():
        with only_owner(root, seconds=-1):  # another call may be making the plan
            asked = {name: getattr(args, name) for name in ASKED} | {"device": device()}
            num_parallel = args.num_parallel or default_num_parallel([])
            plan, news = read_plan(root, asked, num_parallel)
            paths = prepare_text(args.text, root / "text", args.run_length)
            setup, is_new = Setup(args, paths, num_cut(root / "text"), num_parallel), plan is None
            if plan is None:
                plan = setup.plan(budget, clock.taken_here())
            else:
                unknown = [name for name in args.schemes if plan.costs and name not in plan.costs]
                plan = plan.with_schemes(args.schemes, setup.costs(unknown))
                news = "\n".join(filter(None, [news, plan.excess(budget, args.budget)]))
            if not args.dry_run:
                save_plan(root, asked, plan)
        print("\n".join(filter(None, [setup.describe(plan), news])), flush=True)
        if args.dry_run:
            return []
        clock.start(anew=is_new)
        comparison = _Comparison(args, setup, plan, clock, is_new)
        final = comparison.train()
    with only_owner(root, seconds=-1):
        results = collect_results(final, root)
        written = write_report(results, root / "report", title=f"Position schemes on {setup.name}", varied=VARIED)
    groups = group_results(results, VARIED)
    found = [line for answer in answers(groups) for line in sentences(answer)]
    found += [*filter(None, [edge_text(root, args.schemes)]), *caveats(groups)]
    print("\n".join(["", *(line.replace("**", "") for line in found), ""]))
    print("\n".join([*filter(None, [comparison.conclusion()]), f"wrote {written[1]}"]))
    best = best_result(results)["model"]
    _say_what_next(next(run for run in final if run.key == best), setup, root)
    if comparison.left_out:
        say_next("compare", **_flags(args, seeds=comparison.left_out))
    return found


def _flags(args: CompareArguments, **changes: Any) -> dict[str, Any]:
    """Those that are not as by default, with changes."""
    values = {item.name: getattr(args, item.name) for item in fields(args)}
    given = {name: value for name, value in values.items() if value != getattr(CompareArguments(), name)}
    return given | changes


def _say_what_next(best: Run, setup: Setup, root: Path) -> None:
    """How to see what the best model writes, and how to train a model by its recipe for ten times as many steps."""
    say_next("generate", model_name_or_path=best.folder(root), prompt=setup.opening or "The")
    flags = {name: value for name, value in best.settings.items() if name not in NOT_LONGER}
    flags |= {name: LONGER * flags[name] for name in ("max_steps", "warmup_steps")}
    flags = {name: str(value).lower() if isinstance(value, bool) else value for name, value in flags.items()}
    say_next("train", **flags, output_dir=root / "longer")


class _Comparison:
    """The trainings of a comparison, stage by stage, with a plan that changes where the budget asks for it.

    Attributes:
        left_out: the number of seeds that was planned, if this call takes fewer.
    """

    def __init__(self, args: CompareArguments, setup: Setup, plan: Plan, clock: Clock, is_new: bool) -> None:
        self.args, self.setup, self.plan, self.clock, self.is_new = args, setup, plan, clock, is_new
        self.root, self.budget = Path(args.output_dir), parse_budget(args.budget)
        self.stages: list[list[Run]] = []  # those that are done
        self.runs: list[Run] = []  # of the stage that is being done
        self.left_out: int | None = None
        self.has_trained = False
        self.progress = self._new_progress()

    def train(self) -> list[Run]:
        """Chooses a learning rate for each scheme and trains its seeds with it; → the runs of all seeds."""
        try:
            return self._train()
        except KeyboardInterrupt:
            for line in self._known():
                print(line, file=sys.stderr)
            raise
        finally:
            if self.has_trained:
                self.clock.save(every=0)

    def conclusion(self) -> str:
        """What it took; nothing where all was done before."""
        if not self.has_trained:
            return ""
        self.clock.save(every=0)
        return self.progress.conclusion()

    def _train(self) -> list[Run]:
        schemes, root, seeds = self.args.schemes, self.root, SEEDS[:1]
        first = self._stage(lambda: self.setup.runs(self.plan, dict.fromkeys(schemes, RATES), seeds, tuning=True))
        rates = {scheme: [_next_rate(first, scheme, root)] for scheme in schemes}
        second = self._stage(lambda: self.setup.runs(self.plan, rates, seeds, tuning=True))
        tried = [*first, *second]
        chosen = {scheme: [_best_rate(tried, scheme, root)] for scheme in schemes}
        save_tried(root, {scheme: _tried(tried, scheme, root) for scheme in schemes})
        found = ", ".join(f"{name} {rate:g}" for name, (rate,) in chosen.items())
        print(f"learning rates by validation loss: {found}", flush=True)
        return self._stage(lambda: self.setup.runs(self.plan, chosen, SEEDS[: self.plan.seeds], tuning=False))

    def _stage(self, make: Callable[[], list[Run]]) -> list[Run]:
        """Does the runs of a stage; where that changes the plan, those of the new one."""
        while True:
            self.runs = make()
            try:
                self._do(self.runs, may_diverge=len(self.stages) < 2)
            except PlanChanged as change:
                self._adopt(change)
            else:
                self.stages.append(self.runs)
                return self.runs

    def _adopt(self, change: PlanChanged) -> None:
        """Goes on with another plan, which later calls keep."""
        line = change.news
        if change.plan.steps != self.plan.steps:
            self.clock.start(anew=True)
        else:
            self.left_out = self.left_out or self.plan.seeds
            words = command_words("compare", **_flags(self.args, seeds=self.left_out))
            line += f"; to add them later: {shlex.join(words)}"
        self.plan = change.plan
        with only_owner(self.root, seconds=-1):
            asked = {name: getattr(self.args, name) for name in ASKED} | {"device": device()}
            save_plan(self.root, asked, self.plan)
        print(line, flush=True)
        self.progress = self._new_progress()
        for runs in self.stages:
            self.progress.begin(runs, self.root)
            self.progress.end(runs)

    def _new_progress(self) -> ComparisonProgress:
        is_new, seeds = self.is_new, self.args.seeds
        num_parallel = self.setup.num_parallel
        return ComparisonProgress(self.plan, self.budget, num_parallel, self.clock, seeds, is_new)

    def _do(self, runs: Sequence[Run], may_diverge: bool) -> None:
        """Does runs, or what is left of them; `may_diverge`: one may end with a loss that is not finite, as one that
        tries a learning rate.

        Raises:
            ValueError: if one fails.
            PlanChanged: if the budget asks for another plan.
        """
        progress, root, num_parallel = self.progress, self.root, self.setup.num_parallel
        progress.begin(runs, root)
        todo = [run for run in runs if status(run, root)["state"] != "done"]
        if not todo:
            return progress.end(runs)
        self.has_trained = True
        progress.check(runs, root)
        names = {run: run.place for run in runs}

        def watch() -> None:
            progress.check(runs, root)

        with live_table(runs, root, summary=progress.summary, remark=progress.remark, names=names):
            if num_parallel == 1:
                failed = run_here(todo, root, run_one, watch)
            else:
                failed = run_in_processes(todo, root, run_one, num_parallel, watch)
        progress.end(runs)
        failed = [run for run in failed if not (may_diverge and _diverged(run, root))]
        if failed:
            raise ValueError(f"the run {failed[0].place!r} failed: {failure_of(failed[0], root) or 'see above'}.")

    def _known(self) -> list[str]:
        """The validation losses so far, a line for each scheme that has one."""
        tuning = [*self.stages, self.runs][:2]
        runs = [run for stage in tuning for run in stage]
        found = {scheme: _validation_losses(runs, scheme, self.root) for scheme in self.args.schemes}
        return [
            f"{scheme}: validation loss " + ", ".join(f"{loss:.4f} at learning rate {rate:g}" for rate, loss in each)
            for scheme, losses in found.items()
            if (each := sorted(losses.items()))
        ]


def _check(args: CompareArguments) -> None:
    """Refuses what would be found out after the training."""
    if joined := next((name for name in args.schemes if re.search(r"[,;\s]", name)), None):
        names = " ".join(filter(None, re.split(r"[,;\s]+", " ".join(args.schemes))))
        raise ValueError(f"`schemes` are separated by spaces, --schemes {names}; got {joined!r}.")
    if len({*args.schemes}) != len(args.schemes) or not args.schemes:
        raise ValueError(f"`schemes` must name each scheme once, got {args.schemes}.")
    for name in ("train_length", "run_length"):
        if getattr(args, name) < 16:
            raise ValueError(f"`{name}` must be at least 16 tokens, got {getattr(args, name)}.")
    if args.run_length < args.train_length:
        raise ValueError(f"`run_length` must be at least `train_length` {args.train_length}, got {args.run_length}.")
    check_at_least_1("num_parallel", args.num_parallel)
    _check_places(args)
    if args.seeds is not None and not FEWEST_SEEDS <= args.seeds <= len(SEEDS):
        raise ValueError(f"`seeds` must lie between {FEWEST_SEEDS} and {len(SEEDS)}, got {args.seeds}.")
    for scheme in args.schemes:
        try:
            classes = position_embedding_classes(scheme).values()
            check_imported(RelPosConfig(pos_embedding_type=scheme, train_length=args.train_length))
        except ValueError as error:  # which names the field of a model
            raise ValueError(f"`schemes` {scheme!r}: {error}") from error
        if args.run_length > args.train_length and any(cls.has_position_limit for cls in classes):
            raise ValueError(
                f"`schemes`: {scheme!r} has no positions past `train_length` {args.train_length}: leave it out, or "
                f"compare at --run_length {args.train_length}."
            )


def _check_places(args: CompareArguments) -> None:
    """Refuses to write beside a model, or into the text, of which the next call would read what this one wrote."""
    root = Path(os.path.realpath(os.path.expanduser(args.output_dir)))
    if root.is_file():
        raise ValueError(f"`output_dir` {args.output_dir!r} is a file: choose a folder.")
    if (root / "config.json").is_file():
        raise ValueError(f"`output_dir` {args.output_dir!r} holds a model: choose another folder.")
    if args.text is None:
        return
    if not os.path.exists(os.path.expanduser(args.text)):
        raise ValueError(f"`text` {args.text!r} does not exist.")
    text = Path(os.path.realpath(os.path.expanduser(args.text)))
    if root.is_relative_to(text) and not any(map(LEFT_OUT.search, root.relative_to(text).parts)):
        raise ValueError(
            f"`output_dir` {args.output_dir!r} lies in the folder of the `text`, {args.text!r}: choose another."
        )


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
    losses = _validation_losses(runs, scheme, root)
    if not losses:
        raise ValueError(f"`schemes`: the training of {scheme!r} diverges at each of the learning rates {RATES}.")
    return next(iter(losses))
