"""A comparison and its budget: trainings that are faked, on a clock that is faked, on a machine that becomes slower."""

import json
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_relpos import RelPosConfig
from hf_relpos.experiments import compare as module
from hf_relpos.experiments import comparison_costs
from hf_relpos.experiments.commands import COMPARE_DESCRIPTION, CompareArguments
from hf_relpos.experiments.comparison_clock import Clock
from hf_relpos.experiments.comparison_plan import (
    FEWEST_STEPS,
    Cost,
    Plan,
    as_first_spelt,
    budget_text,
    make_plan,
    parse_budget,
    read_plan,
    save_plan,
)
from hf_relpos.experiments.comparison_progress import ComparisonProgress, PlanChanged
from hf_relpos.experiments.comparison_setup import Setup, _counts
from hf_relpos.experiments.grid import Run
from hf_relpos.experiments.workers import schedule
from hf_relpos.messages import exact_time_text
from hf_relpos.results.training_record import TRAINING_RECORD


STEP, WINDOW, START_UP, BESIDE = 0.05, 0.04, 3.0, 30.0  # seconds as measured
COSTS = dict.fromkeys(("alibi", "none"), Cost(STEP, WINDOW))


class Machine:
    """Does the runs of a comparison on a clock of its own.

    Attributes:
        slow: number of runs done → how many times as long as measured the next one takes.
        stop: number of runs done at which Ctrl-C is pressed.
    """

    def __init__(self, monkeypatch, root, budget, seeds=None) -> None:
        self.now, self.done, self.slow, self.stop, self.root = 1e9, 0, lambda done: 1.0, None, root
        self.begun = self.now
        self.args = CompareArguments(schemes=[*COSTS], output_dir=str(root), budget=budget, seeds=seeds, num_parallel=1)
        self.setup = SimpleNamespace(num_parallel=1, runs=self.runs)
        self.plan = make_plan(COSTS, parse_budget(budget), 1, 10**9, seeds, START_UP, BESIDE)
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(module, "run_one", self.run_one)
        monkeypatch.setattr(module, "live_table", lambda *_, **__: nullcontext())
        monkeypatch.setattr(module, "read_result", lambda path: json.loads(path.read_text()))

    @staticmethod
    def runs(plan, rates, seeds, tuning):
        return [
            Run(
                "here",
                {"pos_embedding_type": scheme, "learning_rate": rate, "seed": seed, "max_steps": plan.steps},
                {"eval_split": "validation" if tuning else "test", "max_windows": plan.windows},
                None,
                (),
                f"{scheme}-{rate}-{seed}-{plan.steps}",
            )
            for seed in seeds
            for scheme, values in rates.items()
            for rate in values
        ]

    def run_one(self, run, root):
        if self.stop == self.done:
            raise KeyboardInterrupt
        slow, record = self.slow(self.done), run.folder(root) / TRAINING_RECORD
        if not record.is_file():
            self.now += slow * (START_UP + run.settings["max_steps"] * STEP)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text("{}")
        self.now += slow * WINDOW * run.evaluation["max_windows"] if run.evaluation["eval_split"] == "test" else 0
        run.result(root).parent.mkdir()
        run.result(root).write_text(json.dumps({"lengths": {"32": {"loss": run.settings["learning_rate"] * 100}}}))
        self.done += 1

    def call(self, is_new=True, plan=None):
        """→ the runs of all seeds, and the last line of the call."""
        clock = Clock(self.root, self.now)
        self.now += BESIDE / 2
        clock.start(anew=is_new)
        comparison = module._Comparison(self.args, self.setup, plan or self.plan, clock, is_new)
        final = comparison.train()
        self.now += BESIDE / 2
        return final, comparison.conclusion()

    def asked(self):
        return {name: getattr(self.args, name) for name in module.ASKED} | {"device": module.device()}

    def stored(self, **changes):
        """The plan that another call finds."""
        return read_plan(self.root, self.asked() | changes, 1)[0]


def seeds_of(final):
    """→ the seeds; all runs have the same steps, and each scheme has all seeds."""
    assert len({run.settings["max_steps"] for run in final}) == 1
    seeds = {run.settings["seed"] for run in final}
    assert len(final) == len(seeds) * len(COSTS)
    return len(seeds)


def test_on_a_machine_that_stays_as_it_was_the_plan_is_kept(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path, "10min")
    final, line = machine.call()
    assert seeds_of(final) == machine.plan.seeds and final[0].settings["max_steps"] == machine.plan.steps
    taken = machine.now - machine.begun
    assert 0.95 * 600 < taken <= 600 and line == f"it took {exact_time_text(taken)}"
    assert "slower" not in capsys.readouterr().out


@pytest.mark.parametrize("slow", [2.0, 3.4])
def test_on_a_slower_machine_there_are_fewer_steps(slow, monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path, "10min")
    machine.slow = lambda done: slow
    final, line = machine.call()
    steps = final[0].settings["max_steps"]
    assert seeds_of(final) >= 2 and FEWEST_STEPS <= steps < 0.8 * machine.plan.steps
    assert machine.now - machine.begun <= 1.1 * 600 and "more than the budget" not in line
    printed = capsys.readouterr().out
    assert f"{steps} steps for each run instead of {machine.plan.steps}" in printed
    assert f"what was trained with {machine.plan.steps} steps is not used" in printed
    assert machine.stored().steps == steps  # a later call goes on with them


def test_whatever_happens_it_ends_with_an_answer(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, "5min")
    machine.slow = lambda done: 30.0
    final, line = machine.call()
    assert seeds_of(final) == 2 and final[0].settings["max_steps"] == FEWEST_STEPS
    taken = machine.now - machine.begun
    assert line == f"it took {exact_time_text(taken)}, {exact_time_text(taken - 300)} more than the budget"


def test_steps_that_were_asked_for_once_are_those_of_a_resumed_call(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, "10min")
    save_plan(tmp_path, machine.asked(), machine.plan)
    machine.slow = lambda done: 3.0
    final, _ = machine.call(is_new=False)
    assert final[0].settings["max_steps"] == machine.plan.steps


@pytest.mark.parametrize("begins", [6, 9])  # with the seeds, and in the middle of them
def test_fewer_seeds_where_the_time_does_not_pay_for_them(begins, monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path, "20min")
    assert machine.plan.seeds > 3
    machine.slow = lambda done: 1.0 if done < begins - 2 else 2.5
    final, line = machine.call()
    seeds = seeds_of(final)
    assert 2 <= seeds < machine.plan.seeds and final[0].settings["max_steps"] == machine.plan.steps
    printed = capsys.readouterr().out
    assert f"{seeds} seeds instead of {machine.plan.seeds}: the time that is left pays for no more" in printed
    words = shlex.split(printed.partition("to add them later: ")[2].splitlines()[0])
    assert words[:2] == ["hf-relpos", "compare"] and words[words.index("--seeds") + 1] == str(machine.plan.seeds)
    assert words[words.index("--output_dir") + 1] == str(tmp_path)
    assert machine.stored().seeds == seeds and machine.now - machine.begun < 1.3 * 1200
    done, machine.args.seeds = machine.done, machine.plan.seeds  # that command
    plan = machine.stored(seeds=machine.plan.seeds)
    assert plan.seeds == machine.plan.seeds and plan.steps == machine.plan.steps
    final, line = machine.call(is_new=False, plan=plan)
    assert seeds_of(final) == machine.plan.seeds and machine.done - done == 2 * (machine.plan.seeds - seeds)
    assert "with the calls before, " in line and "more than the budget" in line


def test_seeds_that_were_asked_for_are_trained(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, "20min", seeds=3)
    machine.slow = lambda done: 1.0 if done < 6 else 3.0
    final, line = machine.call()
    taken = machine.now - machine.begun
    assert seeds_of(final) == 3 and line == (
        f"it took {exact_time_text(taken)}, {exact_time_text(taken - 1200)} more than the budget: the machine was "
        "slower than when it was measured"
    )


def test_interrupted_and_resumed_the_times_agree(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path, "10min", seeds=3)
    machine.slow, machine.stop = (lambda done: 1.2), 5
    with pytest.raises(KeyboardInterrupt):
        machine.call()
    assert capsys.readouterr().err.splitlines() == [
        "alibi: validation loss 0.1500 at learning rate 0.0015, 0.3000 at learning rate 0.003, 0.6000 at learning rate "
        "0.006",
        "none: validation loss 0.3000 at learning rate 0.003, 0.6000 at learning rate 0.006",
    ]
    first, machine.stop = machine.now - machine.begun, None
    machine.now += 5000  # which nobody counts
    clock = Clock(tmp_path, machine.now)
    assert clock.before == pytest.approx(first)
    progress = ComparisonProgress(machine.plan, 600, 1, clock)
    for rates in (module.RATES, [min(module.RATES) / 2]):
        runs = machine.runs(machine.plan, dict.fromkeys(COSTS, rates), [42], True)
        progress.begin(runs, tmp_path)
        if rates is module.RATES:
            progress.end(runs)
    left = progress.left([(runs[0], {"state": "done"}), (runs[1], {"state": "waiting"})])
    begun = machine.now
    final, line = machine.call(is_new=False)
    here = machine.now - begun
    assert left == pytest.approx(here - BESIDE, rel=0.1)  # the pace of the first call holds from the beginning
    assert seeds_of(final) == machine.plan.seeds
    over = first + here - 600
    assert line.startswith(f"it took {exact_time_text(here)}, {exact_time_text(first + here)} with the calls before")
    assert (f"{exact_time_text(over)} more than the budget" in line) == (over > 60)
    final, line = machine.call(is_new=False)  # nothing is left to do: nothing is counted
    assert line == "" and Clock(tmp_path, machine.now).before == pytest.approx(first + here)


def test_steps_of_runs_that_go_on_tell_that_the_machine_is_slower(monkeypatch, tmp_path):
    """Before any run is done, and before half of the budget is gone."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    plan = make_plan(COSTS, 300, 2, 10**9, None, 9.0, 30.0)
    clock = Clock()
    progress = ComparisonProgress(plan, 300, 2, clock, is_new=True)
    runs = Machine.runs(plan, dict.fromkeys(COSTS, (0.003, 0.006)), [42], True)
    progress.begin(runs, tmp_path)
    now[0] += 40

    def found(seconds, steps=60):
        state = {"state": "training", "step": steps + 5, "steps": plan.steps, "timed_steps": steps}
        return [(run, state | {"timed_seconds": seconds} if index < 2 else {"state": "waiting"})
                for index, run in enumerate(runs)]  # fmt: skip

    assert progress.change(found(200 * STEP, 200)) is None  # too short a time to tell
    assert progress.change(found(400 * STEP, 400)) is None  # as measured
    assert progress.change(found(14, 19)) is None
    slow = found(120 * STEP * 3, 120)
    changed = progress.change(slow)
    assert isinstance(changed, PlanChanged) and changed.plan.steps < 0.5 * plan.steps
    assert changed.plan.beside + changed.plan.seconds <= 300 and str(changed).startswith("the machine is slower")
    assert ComparisonProgress(plan, 300, 2, clock).change(slow) is None  # a plan that others made
    fixed = ComparisonProgress(plan, 300, 2, clock, seeds=4, is_new=True)
    fixed.begin(runs, tmp_path)
    assert fixed.change(slow).plan.seeds == 4


def test_what_watches_the_runs_can_end_them(tmp_path):
    looks = []

    def watch():
        looks.append(1)
        if len(looks) == 2:
            raise PlanChanged(Plan(1, 2, 8, 1.0), "enough")

    with ThreadPoolExecutor(1) as pool, pytest.raises(PlanChanged):
        run = Run("here", {}, {}, None, (), "one")
        schedule([run], tmp_path, lambda run, root: time.sleep(0.8), lambda task, place: pool.submit(task), 1, watch)
    assert len(looks) == 2


def test_a_budget_that_is_named_is_accepted():
    costs = dict.fromkeys(("alibi", "rotary", "none"), Cost(0.1, 5.0))
    cheap = dict.fromkeys(costs, Cost(0.1, 0.5))
    ways = [("--seeds 2", costs, 2), ("--run_length 512", cheap, 3), ("--run_length 512 --seeds 2", cheap, 2)]
    for budget in (10, 200, 350):
        with pytest.raises(ValueError, match="affords no comparison") as refused:
            make_plan(costs, budget, 2, 10**9, 3, 9.0, 30.0, ways)
        named = str(refused.value).partition("--budget ")[2].split()[0].strip(",.")
        noisy = dict.fromkeys(costs, Cost(0.105, 5.25))  # as measured once more
        for measured in (costs, noisy):
            assert make_plan(measured, parse_budget(named), 2, 10**9, 3, 9.0, 30.0).steps >= FEWEST_STEPS
        for flags, cheaper, seeds in ways:
            if f"take {flags}," in str(refused.value) or f"or {flags}," in str(refused.value):
                assert make_plan(cheaper, budget, 2, 10**9, seeds, 9.0, 30.0).steps >= FEWEST_STEPS
    assert "allow --budget 7min, or take --seeds 2, or --run_length 512, or fewer schemes." in str(refused.value)
    assert (budget_text(30), budget_text(81), budget_text(200)) == ("40s", "90s", "4min")


def test_reading_has_its_share_of_the_budget_and_what_the_steps_leave():
    """Long documents: a window costs as much as five steps."""
    costs, share = dict.fromkeys(("alibi", "rotary", "none"), Cost(0.1, 0.5)), 0.2
    windows = []
    for budget in (300, 600, 1200, 2400, 4800):
        plan = make_plan(costs, budget, 2, 10**9, 2, 9.0, 30.0)
        reading = 3 * plan.seeds * plan.windows * 0.5 / 2
        assert plan.windows == 8 or plan.windows == 48 or reading == pytest.approx(share * (budget - 30), abs=6)
        assert 0.95 * budget < plan.beside + plan.seconds <= budget
        windows.append(plan.windows)
    assert windows == sorted(windows) and (windows[0], windows[-1]) == (36, 48)
    assert make_plan(costs, 900, 2, 10**9, 5, 9.0, 30.0).windows < make_plan(costs, 900, 2, 10**9, 2, 9.0, 30.0).windows
    assert make_plan(costs, 300, 2, 10**9, 2, 9.0, 30.0, most_windows=20).windows == 20  # the text holds no more
    assert make_plan(costs, 1200, 2, 200, 2, 9.0, 30.0).windows == 48  # nor can there be more steps


def test_the_windows_stay_where_a_comparison_grows(tmp_path):
    costs = dict.fromkeys(COSTS, Cost(0.1, 1.0))
    plan, asked = make_plan(costs, 600, 2, 10**9), {"budget": "10min", "seeds": None, "schemes": [*COSTS]}
    assert 8 < plan.windows < 48
    save_plan(tmp_path, asked, plan)
    for change in ({"budget": "2h"}, {"seeds": 5}, {"schemes": [*COSTS, "rotary"]}):
        found, _ = read_plan(tmp_path, asked | change, 2)
        assert found.with_schemes([*COSTS, "rotary"], {"rotary": Cost(0.1, 1.0)}).windows == plan.windows
        assert found.evaluation("none") == plan.windows


def test_other_schemes_have_the_plan_of_the_first(tmp_path):
    plan = make_plan(COSTS, 600, 2, 10**9, 3)
    asked = {"budget": "10min", "seeds": None, "schemes": [*COSTS]}
    save_plan(tmp_path, asked, plan)
    more = asked | {"schemes": ["none", "rotary", "alibi"]}
    found, news = read_plan(tmp_path, more, 2)
    made = found.with_schemes(more["schemes"], {"rotary": Cost(0.2, 0.06)})
    assert (made.steps, made.seeds, made.num_runs, [*made.costs]) == (plan.steps, 3, 15, more["schemes"])
    assert made.seconds > plan.seconds and news == f"added: rotary, with {plan.steps} steps and 3 seeds as the others"
    assert plan.excess(600, "10min") == "" and made.excess(600, "10min").endswith(
        " min more than `budget` 10min, to which only a new comparison is fitted"
    )
    save_plan(tmp_path, more, made)
    fewer = asked | {"schemes": ["rotary"]}
    found, news = read_plan(tmp_path, fewer, 2)
    made = found.with_schemes(["rotary"], {})
    assert (made.steps, made.seeds, made.num_runs) == (plan.steps, 3, 5)
    assert news == "not in this answer: alibi, none, which stay in the folder; name them too to compare all"
    save_plan(tmp_path, fewer, made)
    found, _ = read_plan(tmp_path, more, 2)  # nobody forgot the others
    assert found.num_runs == 15 and {*found.costs} == {*more["schemes"]}


def test_the_same_folder_under_another_name_holds_the_same_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan, asked = make_plan(COSTS, 600, 2, 10**9, 3), {"budget": "10min", "seeds": None, "schemes": [*COSTS]}
    assert as_first_spelt(Path("out")) == Path("out")
    save_plan(Path("out"), asked, plan)
    for name in ("out", "./out/", tmp_path / "out", "../" + tmp_path.name + "/out"):
        save_plan(Path(name), asked, plan)
        assert str(as_first_spelt(Path(name))) == "out"
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert str(as_first_spelt(Path("../out"))) == "../out"


def test_flags_that_make_a_comparison_cheaper():
    setup = object.__new__(Setup)
    setup.args = CompareArguments(train_length=128, run_length=1024, seeds=3)
    setup.batch_size = 8
    costs = {"alibi": Cost(0.1, setup._window(0.1, 1024))}
    ways = setup._ways(costs)
    lengths = ["--run_length 512", "--run_length 256", "--run_length 128"]
    assert [flags for flags, _, _ in ways] == ["--seeds 2", *lengths, *(f"{each} --seeds 2" for each in lengths)]
    assert [seeds for _, _, seeds in ways] == [2, 3, 3, 3, 2, 2, 2]
    times = [cheaper["alibi"].window for _, cheaper, _ in ways[:4]]
    assert times == sorted(times, reverse=True) and times[0] == costs["alibi"].window > 3 * times[3]
    setup.args.seeds = None
    assert [flags for flags, _, _ in setup._ways(costs)] == lengths  # two seeds are what it takes anyway


def test_the_help_says_how_a_comparison_goes_on():
    text = " ".join(COMPARE_DESCRIPTION.split())
    assert "it takes more seeds, a larger budget or more schemes: what is done is kept" in text
    helps = {item.name: item.metadata["help"] for item in fields(CompareArguments)}
    assert "2 to 5" in helps["seeds"] and "separated by spaces" in helps["schemes"]


def test_documents_that_are_read():
    """All of them, those that hold the run length, those of which a window is taken."""
    assert _counts([100, 10, 250], [0, 1, 2], 50, 48) == (3, 2, 2)
    assert _counts([64] * 100 + [10] * 7, range(107), 32, 48) == (107, 100, 48)
    assert _counts([64, 64, 10], [0, 0, 1], 32, 48) == (2, 1, 1)  # pieces of one document


def test_a_scheme_that_is_added_is_trained_alone(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path, "5min")
    save_plan(tmp_path, machine.asked(), machine.plan)
    machine.call()
    done, taken = machine.done, machine.now - machine.begun
    machine.args.schemes = ["rotary", "none", "alibi"]
    plan = machine.stored().with_schemes(machine.args.schemes, {"rotary": Cost(STEP, WINDOW)})
    save_plan(tmp_path, machine.asked(), plan)
    final, line = machine.call(is_new=False, plan=plan)
    assert machine.done - done == 2 + 1 + plan.seeds and len(final) == 3 * plan.seeds
    assert {run.settings["max_steps"] for run in final} == {machine.plan.steps} and plan.seeds == machine.plan.seeds
    total = machine.now - machine.begun
    assert line.startswith(f"it took {exact_time_text(total - taken)}, {exact_time_text(total)} with the calls before")
    assert "seeds instead of" not in capsys.readouterr().out and "slower" not in line  # it is no matter of the budget
    done, machine.args.schemes = machine.done, ["alibi", "rotary"]
    final, line = machine.call(is_new=False, plan=machine.stored().with_schemes(machine.args.schemes, {}))
    assert machine.done == done and line == "" and len(final) == 2 * plan.seeds


def test_what_was_measured_is_kept_for_some_minutes(monkeypatch, tmp_path):
    """A budget that was named is asked about with the same numbers."""
    now, found = [1000.0], iter([0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(comparison_costs, "measure", lambda *_: next(found))

    def measured(scheme="alibi", length=32, threads=1):
        config = RelPosConfig(pos_embedding_type=scheme, vocab_size=300)
        return comparison_costs.kept_measure(tmp_path, config, 4, length, "cpu", False, threads)

    assert (measured(), measured("none"), measured(), measured("none")) == (0.1, 0.2, 0.1, 0.2)
    assert measured(threads=2) == 0.3
    now[0] += comparison_costs.KEPT
    assert measured() == 0.4
    (tmp_path / comparison_costs.MEASURED).write_text("[")
    with pytest.raises(StopIteration):  # measured anew
        measured()
