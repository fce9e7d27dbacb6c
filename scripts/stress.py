#!/usr/bin/env python
"""Kills small trainings, finetunings and sweeps of two workers at random moments and starts them again until they are
done: weights and results must be those of undisturbed runs, bit for bit, no process may outlive its parent, and
starting what is finished must change no file. Then starts sweeps two at a time in one folder: they must share the work.
On Linux with CPUs, without a network.

python scripts/stress.py --kills 50 --together 10
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Process, get_context
from pathlib import Path


WORDS = "the state of union and people in congress a government peace war with law to will our year country".split()
KINDS = ("train", "finetune", "sweep")
# moment → the files of a run that say that it has come, and the greatest number of new ones to wait for
MOMENTS = {
    "in a save": ("checkpoint-*", 4),
    "after a save": ("checkpoint-*/trainer_state.json", 4),
    "in the final evaluation": ("model.safetensors", 1),
    "past the end": ("training.json", 1),
}
KILLS_PER_RUN = 9
SECONDS_TO_END = 120  # for a worker of a killed sweep that still imports torch: it notices when it has done so
MARK = "HF_RELPOS_STRESS"  # variable of the environment that all processes of a call have
RECIPE = {"max_steps": 60, "per_device_train_batch_size": 4, "eval_steps": 60, "save_steps": 10, "logging_steps": 10}
RECIPE |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "use_cpu": "true", "bf16": "false"}
RECIPE |= {"report_to": "none", "disable_tqdm": "true", "max_eval_samples": 64}
MODEL = {"block_size": 32, "vocab_size": 300, "pos_embedding_type": "linear_cpb", "position_start_augmentation": "true"}
MODEL |= {"config_overrides": "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,hidden_dropout=0.1"}


@dataclass
class Call:
    """A script that is started, killed and started again.

    Attributes:
        name: train, finetune or sweep.
        main: the function of the script.
        flags: of the script, without the output folder.
        data: folder of the corpus and the log.
    """

    name: str
    main: Callable[[], None]
    flags: dict
    data: Path

    def start(self, output: Path, resume: bool = False) -> Process:
        flags = self.flags | {"output_dir": output} | ({"resume_from_checkpoint": "last"} if resume else {})
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        process = get_context("fork").Process(target=run_script, args=(self, words, output))
        process.start()
        return process

    def finish(self, output: Path, resume: bool = False) -> None:
        """Starts it and waits until it is done."""
        process = self.start(output, resume)
        process.join()
        if code := process.exitcode:
            raise SystemExit(f"{self.name} failed with exit code {code}\n{(self.data / 'log.txt').read_text()[-3000:]}")

    def files(self, output: Path, pattern: str) -> set[Path]:
        """Of its runs."""
        return set(output.glob(f"runs/*/{pattern}" if self.name == "sweep" else pattern))

    def is_finished(self, output: Path) -> bool:
        return (output / ("results.jsonl" if self.name == "sweep" else "training.json")).exists()

    def can_resume(self, output: Path) -> bool:
        """Whether a single run has what `--resume_from_checkpoint last` needs; a sweep looks for itself."""
        saved = any(output.glob("checkpoint-*/trainer_state.json"))
        return self.name != "sweep" and (saved or self.is_finished(output))


def load_scripts(cache: Path) -> dict[str, Callable[[], None]]:
    """→ the function of each script. They are imported once, so that the calls, which are forked, begin at once."""
    os.environ |= {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from hf_relpos.experiments.commands import sweep_main
    from hf_relpos.training.commands import finetune_main, train_main

    return {"train": train_main, "finetune": finetune_main, "sweep": sweep_main}


def run_script(call: Call, words: list[str], output: Path) -> None:
    """In a process of its own."""
    log = os.open(call.data / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[MARK] = str(output)
    sys.argv = [call.name, *words]
    call.main()


# --- what a call leaves


def hashes(output: Path, pattern: str = "*") -> dict[str, str]:
    """File → hash, of all in the folder."""
    paths = sorted(path for path in output.rglob(pattern) if path.is_file())
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def outcome(output: Path) -> dict:
    """The final weights, losses and results, without times."""
    facts = dict(hashes(output, "model.safetensors"))
    for path in output.rglob("training.json"):
        record = json.loads(path.read_text())
        facts[str(path.relative_to(output))] = [record[name] for name in ("num_steps", "num_tokens", "validation_loss")]
    for path in output.rglob("results.jsonl"):
        for line in path.read_text().splitlines():
            result = json.loads(line)
            name = f"result of seed {result['seed']} at {result['train_length']}"
            facts[name] = [result[key] for key in ("lengths", "loss_by_position")]
        facts["results"] = len(path.read_text().splitlines())
    return {name: fact for name, fact in facts.items() if "checkpoint-" not in name}


def difference(ours: dict, theirs: dict) -> list[str]:
    return sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))


# --- its processes


def processes(output: Path) -> dict[int, tuple[int, str]]:
    """Number → the parent's number and the command line, of all that live and were started for this folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile, or another user's
            continue
        if f"{MARK}={output}".encode() in variables and state != "Z":
            found[int(folder.name)] = int(parent), words
    return found


def workers(output: Path, parent: int) -> list[int]:
    return [number for number, (its, words) in processes(output).items() if its == parent and "spawn_main" in words]


def no_orphan(output: Path, counts: Counter) -> None:
    """Waits until no process of a call that has ended lives any more."""
    begun = time.monotonic()
    while left := processes(output):
        if time.monotonic() - begun > SECONDS_TO_END:
            counts["orphans"] += len(left)
            for number in left:
                os.kill(number, signal.SIGKILL)
            return
        time.sleep(0.05)


# --- kills


def wait_for(call: Call, process: Process, output: Path, moment: str, until: float, number: int) -> None:
    """Waits until `number` new files say that the moment has come, or the process has ended."""
    pattern = MOMENTS[moment][0] if moment in MOMENTS else ""
    before = call.files(output, pattern) if pattern else set()
    while process.exitcode is None:
        if pattern:
            found = call.files(output, pattern)
            before &= found  # one that is removed may come again
            if len(found - before) >= number:
                return
        elif time.monotonic() > until:
            return
        time.sleep(0.001)


def kill(call: Call, process: Process, output: Path, moment: str, rng: random.Random, counts: Counter) -> bool:
    """Sends a signal to the process, or to a worker of a sweep, and waits for its end; → whether there was one."""
    number, target = rng.choice((signal.SIGKILL, signal.SIGTERM)), process.pid
    if call.name == "sweep" and rng.random() < 1 / 3:
        living = workers(output, process.pid)
        if not living or process.exitcode is not None:
            return False
        target = rng.choice(living)
    if process.exitcode is not None:
        return False
    try:
        os.kill(target, number)
    except ProcessLookupError:
        return False
    whom = call.name if target == process.pid else "a worker of a sweep"
    counts["kills"] += 1
    counts[f"kills: {signal.Signals(number).name} {whom} {moment}"] += 1
    if target == process.pid:
        process.join()
        no_orphan(output, counts)
    return True


def disturb(call: Call, output: Path, kills: int, seconds: float, rng: random.Random, counts: Counter) -> int:
    """Starts the call again and again until it is done, with kills on the way; → how many there were."""
    done = 0
    while not call.is_finished(output):
        resume = call.can_resume(output)
        if call.name != "sweep" and not resume and output.exists():  # killed before its first checkpoint was whole
            shutil.rmtree(output)
            counts["started anew before the first checkpoint"] += 1
        process = call.start(output, resume)
        counts["starts"] += 1
        while process.exitcode is None:
            if done == kills:
                process.join()
                break
            moment = rng.choice(["any time", *MOMENTS])
            number = rng.randint(1, MOMENTS.get(moment, ("", 1))[1])
            wait_for(call, process, output, moment, time.monotonic() + rng.uniform(0, seconds), number)
            time.sleep(rng.uniform(0, 0.2) if "final" in moment or "end" in moment else rng.uniform(0, 0.02))
            done += kill(call, process, output, moment, rng, counts)
        if process.exitcode not in (0, 130, -signal.SIGKILL, -signal.SIGTERM):
            raise SystemExit(f"{call.name} failed with exit code {process.exitcode}")
    return done


# --- the two tests


def undisturbed(calls: list[Call], folder: Path) -> tuple[dict[str, dict], dict[str, float]]:
    """→ for each kind of call, what it leaves and the seconds that it takes in one process."""
    expected, seconds = {}, {}
    for call in calls:
        begun = time.monotonic()
        one = replace(call, flags=call.flags | {"num_parallel": 1}) if call.name == "sweep" else call
        one.finish(folder / f"{call.name}-whole")
        seconds[call.name] = time.monotonic() - begun
        expected[call.name] = outcome(folder / f"{call.name}-whole")
    return expected, seconds


def kill_calls(
    calls: list[Call], folder: Path, num_kills: int, known: tuple[dict, dict], rng: random.Random, counts: Counter
) -> None:
    """Kills each kind of call equally often and compares what they leave with what is known of undisturbed ones."""
    expected, seconds = known
    left = {call.name: len(range(index, num_kills, len(calls))) for index, call in enumerate(calls)}
    for call in calls:
        while left[call.name]:
            counts[f"{call.name}: disturbed until done"] += 1
            output = folder / f"{call.name}-{counts[f'{call.name}: disturbed until done']}"
            left[call.name] -= disturb(
                call, output, min(left[call.name], KILLS_PER_RUN), seconds[call.name], rng, counts
            )
            differing = difference(outcome(output), expected[call.name])
            if call.files(output, "checkpoint-*") and call.name == "sweep":
                differing.append("checkpoints are left")
            counts["disturbed, other outcome"] += bool(differing)
            before = hashes(output)
            call.finish(output, resume=call.name != "sweep")
            changed = difference(hashes(output), before)
            counts["started when finished, files changed"] += bool(changed)
            if differing or changed:
                print(f"{output.name}: other outcome {differing}, changed {changed}", file=sys.stderr)
            print(f"{counts['kills']} of {num_kills} kills", file=sys.stderr, flush=True)


def start_together(sweep: Call, folder: Path, times: int, expected: dict, rng: random.Random, counts: Counter) -> None:
    """Starts two sweeps in one folder, each of one or two workers."""
    for index in range(times):
        output = folder / f"together-{index}"
        pair = []
        for _ in range(2):
            one = replace(sweep, flags=sweep.flags | {"num_parallel": rng.choice((1, 1, 2))})
            pair.append(one.start(output))
            time.sleep(rng.choice((0, 0, rng.uniform(0, 10))))
        for process in pair:
            process.join()
        codes = [process.exitcode for process in pair]
        trained = [path.read_text().count("train_runtime") for path in output.glob("runs/*/log.txt")]
        counts["pairs of sweeps"] += 1
        counts["pairs: false failures"] += codes != [0, 0] or bool(list(output.glob("runs/*/failure.txt")))
        counts["pairs: runs trained once"] += trained.count(1)
        counts["pairs: runs lost or trained twice"] += len(trained) - trained.count(1)
        counts["pairs: other outcome"] += bool(difference(outcome(output), expected))
        no_orphan(output, counts)
        print(f"{index + 1} of {times} pairs", file=sys.stderr, flush=True)


def make_calls(folder: Path) -> list[Call]:
    """The corpus, random words, and the experiment; → the calls."""
    rng = random.Random(0)
    for name, num_words in (("train", 20_000), ("valid", 5_000)):
        words = (rng.choice(WORDS) for _ in range(num_words))
        text = "".join(word + ("\n" if rng.random() < 0.05 else " ") for word in words)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    files = {"train_file": str(folder / "train.txt"), "validation_file": str(folder / "valid.txt")}
    finetuning = RECIPE | {"block_size": 64, "max_steps": 40, "eval_steps": 40}
    experiment = {"train": {**RECIPE, **MODEL, **files}, "grid": {"seed": [1, 2]}, "finetune": finetuning}
    experiment |= {"evaluate": {"eval_lengths": [32, 64], "max_windows": 16, **files}}
    (folder / "experiment.yaml").write_text(json.dumps(experiment), encoding="utf-8")  # JSON is YAML
    base = {"model_name_or_path": folder / "train-whole"}
    sweep = {"experiment": folder / "experiment.yaml", "num_parallel": 2}
    flags = {"train": RECIPE | MODEL | files, "finetune": finetuning | base | files, "sweep": sweep}
    mains = load_scripts(folder / "cache")
    return [Call(name, mains[name], flags[name], folder) for name in KINDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="How many, of all kinds together.")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="What is killed.")
    parser.add_argument("--together", type=int, default=10, help="How often two sweeps are started in one folder.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = make_calls(folder)
        try:
            killed = [call for call in calls if call.name in args.kinds and args.kills]
            needed = [*killed, *(calls[:1] if "finetune" in args.kinds else []), *(calls[2:] if args.together else [])]
            known = undisturbed([call for call in calls if call in needed], folder)
            kill_calls(killed, folder, args.kills, known, rng, counts)
            start_together(calls[-1], folder, args.together, known[0].get("sweep", {}), rng, counts)
        except BaseException:
            print((folder / "log.txt").read_text()[-5000:], file=sys.stderr)
            raise
        finally:
            for line, count in sorted(counts.items()):
                print(f"{count:4}  {line}", flush=True)
    bad = ("orphans", "other outcome", "changed", "false failures", "lost")
    if any(count for line, count in counts.items() if any(word in line for word in bad)):
        sys.exit(1)


if __name__ == "__main__":
    main()
