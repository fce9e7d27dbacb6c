"""Experiments: a YAML file states a grid of runs; each is named by the hash of all that determines it."""

import hashlib
import itertools
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from ..cli import parse_values
from ..environment import versions, write_json
from ..evaluation.evaluate import EvaluationArguments, evaluate_model
from ..model.configuration_relpos import RelPosConfig
from ..results.training_record import RESULT_NEUTRAL_FLAGS, TRAINING_RECORD
from ..tasks.arguments import DataArguments
from ..tasks.base import check_task
from ..training.arguments import FinetuningArguments, RelPosTrainingArguments
from ..training.model_setup import ModelArguments, new_config
from ..training.scheme_change import ChangeArguments, changed_config
from ..training.train import finetune, train


# of a run whose worker died
MAX_RETRIES = 3
PROGRESS, FAILURE, LOG, RESULT = "progress.json", "failure.txt", "log.txt", "results.json"
TRAIN_TYPES = (ModelArguments, DataArguments, RelPosTrainingArguments)
FINETUNE_TYPES = (ChangeArguments, DataArguments, FinetuningArguments)
EVALUATE_TYPES = (EvaluationArguments, DataArguments)
SECTIONS = {"train": TRAIN_TYPES, "finetune": FINETUNE_TYPES, "evaluate": EVALUATE_TYPES, "grid": TRAIN_TYPES}
# set by the sweep itself, or by nobody there
RESERVED = {"output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token"}
FILES = ("train_file", "validation_file")
# what --scale multiplies, and the least that it leaves
SCALED = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "warmup_steps": 0, "max_windows": 16}


@dataclass(eq=False)
class Run:
    """One model to train and to evaluate.

    Attributes:
        place: where in the file it comes from.
        settings: flags of scripts/train.py, or of scripts/finetune.py if there is a base.
        evaluation: flags of scripts/evaluate.py.
        base: the run whose model it goes on from.
    """

    place: str
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    base: "Run | None" = None
    _key: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits of the hash of what determines the trained model."""
        if not self._key:
            facts = {name: value for name, value in self.settings.items() if name not in RESULT_NEUTRAL_FLAGS}
            texts = {name: _digest(facts[name]) for name in FILES if facts.get(name)}
            base = self.base and self.base.key
            self._key = _hash({"version": versions().get("hf_relpos"), "settings": facts, "texts": texts, "base": base})
        return self._key

    @property
    def label(self) -> str:
        """A few words for a person."""
        words = [self.base.label] if self.base else [str(self.settings.get("pos_embedding_type", "linear_cpb"))]
        if self.base:
            changes = (self.settings.get(name) for name in ("pos_embedding_type", "rope_parameters"))
            words += [f"then {change}" for change in changes if change is not None]
        words += ["augmented"] if self.settings.get("position_start_augmentation") else []
        words += [f"{sampling} positions"] if (sampling := self.settings.get("position_sampling")) else []
        names = {"layer_types": "{}", "sliding_window": "window {}", "model_size": "{}", "block_size": "at {}"}
        names |= {"max_steps": "{} steps"} if self.base else {}
        words += [text.format(self.settings[name]) for name, text in names.items() if name in self.settings]
        return " ".join(words) + ("" if self.base else f" seed {self.settings.get('seed', 42)}")

    def folder(self, root: Path) -> Path:
        """Where the trained model lies."""
        return root / "runs" / self.key

    def result(self, root: Path) -> Path:
        """Where its evaluation lies: another one does not train the model again."""
        facts = {name: value for name, value in self.evaluation.items() if name not in RESULT_NEUTRAL_FLAGS}
        return self.folder(root) / f"evaluation-{_hash(facts)[:8]}" / RESULT


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _digest(path: str) -> str:
    """Hash of a file, or of all files of a folder."""
    paths = sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)]
    digest = hashlib.sha256()
    for each in paths:
        digest.update(each.name.encode())
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- the file


def load_experiment(path: str, scale: float = 1.0) -> list[Run]:
    """The runs that a YAML file states.

    The file has the sections `train`, `evaluate` and `finetune` (flags of the scripts of these names) and `grid` (one
    dictionary or several, flag → list of values): each dictionary of the grid is multiplied out, and so are the lists
    of `finetune`, which goes on from each trained model. Bases come before what goes on from them.

    Args:
        path: the file.
        scale: factor of the numbers of steps and of evaluation windows.

    Raises:
        ValueError: for a file that cannot be read, an unknown key, scheme or size, a grid without runs, or two entries
            that are the same run, naming the place in the file.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"experiment {path!r} cannot be read: {error}") from error
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"`scale` must be above 0, got {scale}.")
    if not isinstance(content, dict):
        raise ValueError(f"experiment {path!r} must hold a dictionary with a `grid`.")
    unknown = sorted(map(str, set(content) - set(SECTIONS)))
    if unknown:
        raise ValueError(f"{path}: unknown section {unknown[0]!r}, must be one of {list(SECTIONS)}.")
    grids = content.get("grid")
    grids = grids if isinstance(grids, list) else [grids]
    train, evaluation = (_section(path, name, content.get(name) or {}) for name in ("train", "evaluate"))
    runs: list[Run] = []
    for index, grid in enumerate(grids):
        place = f"grid[{index}]" if len(grids) > 1 else "grid"
        for number, choice in enumerate(_multiply(path, place, _section(path, "grid", grid or {}, place))):
            settings = _scaled({**train, **choice}, scale)
            tested = {"task": settings["task"], **evaluation} if "task" in settings else evaluation
            runs.append(Run(f"{path}: {place}, entry {number + 1}", settings, _scaled(tested, scale)))
    if not runs:
        raise ValueError(f"{path}: `grid` is empty: it must list values of at least one flag.")
    if content.get("finetune"):
        section = _section(path, "finetune", content["finetune"])
        section = {name: value if isinstance(value, list) else [value] for name, value in section.items()}
        for run, choice in itertools.product(list(runs), list(_multiply(path, "finetune", section))):
            inherited = {name: value for name, value in run.settings.items() if name in _names(DataArguments)}
            settings = _scaled({**inherited, "seed": run.settings.get("seed", 42), **choice}, scale)
            place = f"{path}: finetune {choice} of {run.place.partition(': ')[2]}"
            runs.append(Run(place, settings, run.evaluation, run))
    _check(runs, drop_repeats=scale < 1)
    return runs


def grid_settings(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The flags of each run of an experiment, as its file holds it, that does not go on from another; unchecked."""
    grids = content["grid"] if isinstance(content["grid"], list) else [content["grid"]]
    return [{**content.get("train", {}), **choice} for grid in grids for choice in _multiply("", "grid", grid)]


def _names(*types: type) -> set[str]:
    return {item.name for each in types for item in fields(each) if item.init}


def _section(path: str, name: str, values: Any, place: str | None = None) -> dict[str, Any]:
    place = place or name
    if not isinstance(values, dict):
        raise ValueError(f"{path}: `{place}` must be a dictionary of flags, got {values!r}.")
    for key in values:
        if key in RESERVED or key == "model_name_or_path":
            raise ValueError(f"{path}: `{place}.{key}` is not for an experiment to set.")
        if key not in _names(*SECTIONS[name]):
            raise ValueError(f"{path}: `{place}` holds an unknown flag: {key!r}.")
    return values


def _multiply(path: str, place: str, section: dict[str, Any]) -> list[dict[str, Any]]:
    for name, values in section.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: `{place}.{name}` must be a list of values, got {values!r}.")
    if not section:
        return []
    return [dict(zip(section, values)) for values in itertools.product(*section.values())]


def _scaled(settings: dict[str, Any], scale: float) -> dict[str, Any]:
    if scale == 1:
        return settings
    return {
        name: max(SCALED[name], round(value * scale)) if name in SCALED and value else value
        for name, value in settings.items()
    }


def _check(runs: list[Run], drop_repeats: bool) -> None:
    """Parses all flags and makes sure that no two runs are the same; scaling alone may make some of them equal."""
    places: dict[str, Run] = {}
    configs: dict[Run, RelPosConfig] = {}
    for run in list(runs):
        try:
            types = FINETUNE_TYPES if run.base else TRAIN_TYPES
            model_args, data_args, args = parse_values(types, {**run.settings, "output_dir": "unused"})
            if data_args.task is not None:
                check_task(data_args.task)
            if run.base is None:
                configs[run] = new_config(model_args, args.block_size)
            elif run.base in configs:
                changed_config(configs[run.base], model_args, args.block_size)
            parse_values(EVALUATE_TYPES, {**run.evaluation, "output_dir": "unused", "model_name_or_path": "unused"})
            key = run.key
        except (ValueError, OSError) as error:
            raise ValueError(f"{run.place}: {error}") from error
        if key in places and drop_repeats:
            runs.remove(run)
        elif key in places:
            raise ValueError(f"{run.place} is the same run as {places[key].place}.")
        places.setdefault(key, run)


# --- one run


class ProgressCallback(TrainerCallback):
    """Writes the step and the loss to a file, from which whoever runs the sweep reads them."""

    def __init__(self, path: Path) -> None:
        self.path, self.written, self.begun, self.first_step = path, 0.0, time.time(), 0
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, done = time.time(), state.global_step - self.first_step
        if now - self.written < 0.5 and state.global_step < state.max_steps:
            return
        left = (now - self.begun) / max(done, 1) * (state.max_steps - state.global_step)
        progress = {"step": state.global_step, "steps": state.max_steps, "loss": self.loss, "seconds_left": left}
        progress["pid"] = os.getpid()
        write_json(self.path, progress)
        self.written = now


def run_one(run: Run, root: Path) -> None:
    """Trains a model, from its last checkpoint if it was interrupted, and evaluates it. What is done stays as it is.

    Everything that it prints goes to log.txt in the run's folder.

    Raises:
        whatever training or evaluation raise; the traceback is kept in failure.txt.
    """
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if not (folder / TRAINING_RECORD).is_file():
                _train(run, root)
            if not run.result(root).is_file():
                values = {
                    **run.evaluation,
                    "model_name_or_path": str(folder),
                    "output_dir": str(run.result(root).parent),
                }
                evaluate_model(*parse_values(EVALUATE_TYPES, values))
        except Exception:
            (folder / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
            raise


def _train(run: Run, root: Path) -> None:
    folder = run.folder(root)
    write_json(folder / "run" / "settings.json", {"label": run.label, "key": run.key, "settings": run.settings})
    for part in folder.glob("checkpoint-*"):
        if not (part / "trainer_state.json").is_file():  # the run was killed while it was being written
            shutil.rmtree(part)
    values = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 1,
        **run.settings,
        "output_dir": str(folder),
    }
    if any(folder.glob("checkpoint-*")):
        values["resume_from_checkpoint"] = "last"
    callbacks = [ProgressCallback(folder / "run" / PROGRESS)]
    if run.base is None:
        train(*parse_values(TRAIN_TYPES, values), callbacks=callbacks)
    else:
        values["model_name_or_path"] = str(run.base.folder(root))
        finetune(*parse_values(FINETUNE_TYPES, values), callbacks=callbacks)
    for part in folder.glob("checkpoint-*"):
        shutil.rmtree(part)


# --- all runs


def status(run: Run, root: Path, since: float = 0.0) -> dict[str, Any]:
    """What a run has left in its folder.

    Args:
        run: any run of the sweep.
        root: folder of the sweep.
        since: seconds of the epoch; progress that was written before is that of a run that was killed.

    Returns:
        `state` ("waiting", "training", "evaluating", "done" or "failed"); `step`, `steps`, `loss`, `seconds_left` and
        `pid` as the run last wrote them.
    """
    folder, progress = run.folder(root), {}
    with suppress(OSError, json.JSONDecodeError):
        path = folder / "run" / PROGRESS
        if path.stat().st_mtime >= since:
            progress = json.loads(path.read_text(encoding="utf-8"))
    if run.result(root).is_file():
        state = "done"
    elif (folder / FAILURE).is_file():
        state = "failed"
    elif (folder / TRAINING_RECORD).is_file():
        state = "evaluating"
    else:
        state = "training" if progress else "waiting"
    return {"state": state, **progress}


def run_here(runs: Sequence[Run], root: Path) -> list[Run]:
    """Runs all in this process, one after another; → those that failed. What goes on from a failed run fails too."""
    failed: list[Run] = []
    if visible_gpus():  # the Trainer would use all of them, with as many times the batch
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[0]
    for run in runs:
        try:
            if run.base in failed:
                raise ValueError(f"the run that it goes on from failed: {run.base.key}")
            run_one(run, root)
        except Exception:
            failed.append(run)
    return failed


def run_in_processes(runs: Sequence[Run], root: Path, num_processes: int) -> list[Run]:
    """Runs several at once, each in a process of its own, the GPUs in turn; → those that failed."""
    devices, threads = visible_gpus(), max(1, torch.get_num_threads() // num_processes)
    # a process for each run: a GPU is chosen before torch has seen one, and memory goes back when a run is done
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:

        def submit(run: Run, place: int) -> Future:
            return pool.submit(_run_on, run, root, devices[place % len(devices)] if devices else None, threads)

        return schedule(runs, submit, num_processes)


def run_on_ray(runs: Sequence[Run], root: Path, cpus_per_run: float, gpus_per_run: float) -> list[Run]:
    """Runs all as tasks of a Ray cluster, as many at once as it has room for; → those that failed.

    The cluster is the one that RAY_ADDRESS names or that runs here, or else one that is started here. All its machines
    must see `root` and the text files under the same paths. A task whose worker dies is started again and goes on from
    its last checkpoint.

    Raises:
        ValueError: if Ray is not installed, or if no machine of the cluster has room for a run.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError('`executor` "ray" needs Ray: pip install -c constraints.txt -e ".[ray]"') from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    need = {"CPU": cpus_per_run, "GPU": gpus_per_run}
    if not any(all(node["Resources"].get(name, 0) >= n for name, n in need.items()) for node in ray.nodes()):
        raise ValueError(f"`cpus_per_run`, `gpus_per_run`: no machine of the cluster has {need}.")
    options = {"num_cpus": cpus_per_run, "num_gpus": gpus_per_run, "max_retries": MAX_RETRIES}
    task = ray.remote(**options)(_run_on)
    threads = max(1, int(cpus_per_run))
    return schedule(runs, lambda run, place: task.remote(run, root.resolve(), None, threads).future(), len(runs))


def schedule(runs: Sequence[Run], submit: Callable[[Run, int], Future], num_places: int) -> list[Run]:
    """Starts a run when a place is free and what it goes on from is done; → those that failed.

    Args:
        runs: bases before what goes on from them.
        submit: starts a run at a place, 0 to `num_places` − 1.
        num_places: how many run at once.
    """
    waiting, failed, places = list(runs), [], list(range(num_places))
    running: dict[Future, tuple[Run, int]] = {}
    while waiting or running:
        for run in list(waiting):
            if run.base in failed:
                waiting.remove(run)
                failed.append(run)
            elif places and run.base not in waiting and all(run.base is not other for other, _ in running.values()):
                waiting.remove(run)
                place = places.pop(0)
                running[submit(run, place)] = run, place
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run, place = running.pop(future)
            places.append(place)
            if future.exception() is not None:
                failed.append(run)
    return failed


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _run_on(run: Run, root: Path, device: str | None, num_threads: int) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(num_threads)
    run_one(run, root)
