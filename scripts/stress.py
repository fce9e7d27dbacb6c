#!/usr/bin/env python
"""Kills small trainings at random moments and resumes them until they are done: the final weights must be those of an
undisturbed run, bit for bit, and resuming a finished run must change no file. On CPUs, without a network.

python scripts/stress.py --kills 50
"""

import argparse
import collections
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


TRAIN = Path(__file__).with_name("train.py")
WORDS = "the state of union and people in congress a government peace war with law to will our year country".split()
MOMENTS = ("any time", "in a save", "after a save", "in the final evaluation", "past the end")
KILLS_PER_RUN = 6
SETTINGS = {"block_size": 32, "max_steps": 300, "per_device_train_batch_size": 4, "vocab_size": 300}
SETTINGS |= {"eval_steps": 300, "save_steps": 20, "logging_steps": 10, "learning_rate": 1e-3, "disable_tqdm": "true"}
SETTINGS |= {"lr_scheduler_type": "cosine", "pos_embedding_type": "linear_cpb", "use_cpu": "true", "bf16": "false"}
SETTINGS |= {"config_overrides": "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,hidden_dropout=0.1"}
SETTINGS |= {"report_to": "none", "position_start_augmentation": "true"}


def write_corpus(folder: Path) -> None:
    """Random words: a training and a validation file."""
    rng = random.Random(0)
    for name, num_words in (("train", 30_000), ("valid", 10_000)):
        words = (rng.choice(WORDS) for _ in range(num_words))
        text = "".join(word + ("\n" if rng.random() < 0.05 else " ") for word in words)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def start(data: Path, output: Path, resume: bool) -> subprocess.Popen:
    """Starts or resumes the training."""
    flags = SETTINGS | {"train_file": data / "train.txt", "validation_file": data / "valid.txt", "output_dir": output}
    flags |= {"resume_from_checkpoint": "last"} if resume else {}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(data / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TRAIN.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with (data / "log.txt").open("a") as log:
        return subprocess.Popen([sys.executable, str(TRAIN), *words], stdout=log, stderr=log, env=environment)


def wait_for(process: subprocess.Popen, output: Path, moment: str, seconds: float, rng: random.Random) -> None:
    """Waits until the moment has come or the process has ended."""
    before, number = set(output.glob("checkpoint-*")), rng.randint(1, 5)
    until = time.monotonic() + rng.uniform(0, seconds)
    while process.poll() is None:
        folders = set(output.glob("checkpoint-*")) - before
        saved = [folder for folder in folders if (folder / "trainer_state.json").exists()]
        before -= {folder for folder in before if not folder.exists()}
        if moment == "any time" and time.monotonic() > until:
            return
        if moment in ("in a save", "after a save") and len(saved if "after" in moment else folders) >= number % 3 + 1:
            time.sleep(rng.uniform(0, 0.02))
            return
        if moment == "in the final evaluation" and (output / "model.safetensors").exists():
            time.sleep(rng.uniform(0, 0.2))
            return
        if moment == "past the end" and (output / "training.json").exists():
            time.sleep(rng.uniform(0, 2))
            return
        time.sleep(0.001)


def hashes(output: Path) -> dict[str, str]:
    """File → hash, of all in the folder of a run."""
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def disturbed_run(
    data: Path, output: Path, kills: int, seconds: float, rng: random.Random, counts: collections.Counter
) -> None:
    """Trains with kills at random moments until the run is done."""
    while not (output / "training.json").exists() or kills:
        resume = any(output.glob("checkpoint-*/trainer_state.json")) or (output / "training.json").exists()
        if not resume and output.exists():  # killed before its first checkpoint was whole
            subprocess.run(["rm", "-rf", str(output)], check=True)
            counts["started anew before the first checkpoint"] += 1
        process = start(data, output, resume)
        if not kills:
            if process.wait():
                raise SystemExit(f"a run failed with exit code {process.returncode}; see {data / 'log.txt'}")
            counts["resumptions"] += resume
            continue
        moment, number = rng.choice(MOMENTS), rng.choice((signal.SIGKILL, signal.SIGTERM))
        wait_for(process, output, moment, seconds, rng)
        hit = process.poll() is None
        if hit:
            process.send_signal(number)
        code = process.wait()
        if not hit and code not in (0,):
            raise SystemExit(f"a run failed with exit code {code}; see {data / 'log.txt'}")
        counts["resumptions"] += resume
        counts[f"{signal.Signals(number).name} {moment}" if hit else "ended before its kill"] += 1
        kills -= hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="How often a run is killed, all runs together.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_corpus(data)
        start(data, data / "first", False).wait()  # fills the cache of tokens
        begun = time.monotonic()
        if start(data, data / "whole", False).wait():
            raise SystemExit((data / "log.txt").read_text()[-3000:])
        seconds = time.monotonic() - begun
        expected = hashes(data / "whole")["model.safetensors"]
        left = args.kills
        while left:
            kills = min(left, KILLS_PER_RUN)
            left -= kills
            counts["runs"] += 1
            output = data / f"run-{counts['runs']}"
            try:
                disturbed_run(data, output, kills, seconds, rng, counts)
            except SystemExit:
                print((data / "log.txt").read_text()[-3000:], file=sys.stderr)
                raise
            before = hashes(output)
            counts["same weights"] += before["model.safetensors"] == expected
            counts["finished runs resumed"] += start(data, output, True).wait() == 0
            counts["of them unchanged"] += hashes(output) == before
    for name, count in sorted(counts.items()):
        print(f"{count:4}  {name}")
    if not counts["runs"] == counts["same weights"] == counts["of them unchanged"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
