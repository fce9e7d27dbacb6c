"""An experiment: a YAML file states a grid of runs, and each run is named by the hash of all that determines it."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..cli import as_list, import_schemes, nearest, parse_values
from ..data.arguments import SOURCE_FLAGS
from ..data.files import content_hash
from ..environment import package_version
from ..evaluation.command import EvaluationArguments
from ..evaluation.evaluate import check_flags, default_lengths
from ..evaluation.loss_by_length import check_lengths
from ..file_reading import read_yaml
from ..model.configuration_relpos import RelPosConfig
from ..model_loading import about_num_weights, check_size
from ..results.training_record import RESULT_NEUTRAL_FLAGS
from ..scheme_check import check_imported
from ..scheme_files import imported_files
from ..tasks.arguments import READING, DataArguments
from ..tasks.base import check_task
from ..training.arguments import FinetuningArguments, RelPosTrainingArguments
from ..training.model_setup import ModelArguments, new_config
from ..training.scheme_change import ChangeArguments, changed_config


RESULT = "results.json"
TRAIN_TYPES = (ModelArguments, DataArguments, RelPosTrainingArguments)
FINETUNE_TYPES = (ChangeArguments, DataArguments, FinetuningArguments)
EVALUATE_TYPES = (EvaluationArguments, DataArguments)
SECTIONS = {"train": TRAIN_TYPES, "finetune": FINETUNE_TYPES, "evaluate": EVALUATE_TYPES, "grid": TRAIN_TYPES}
# flags that the sweep sets itself, or that no run of a sweep may have
RESERVED = {"output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token"}
# what belongs to the text that a run is trained on
TEXT_SETTINGS = {"task", *SOURCE_FLAGS, *READING}
# what --scale multiplies, and the least that it leaves; a number between 0 and 1 is a share of the steps
SCALED = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "warmup_steps": 0}
SCALED |= {"max_windows": 16, "max_eval_samples": 16}


@dataclass(eq=False)
class Run:
    """One model to train and to evaluate.

    Attributes:
        place: where in the file it comes from.
        settings: flags of scripts/train.py, or of scripts/finetune.py if there is a base.
        evaluation: flags of scripts/evaluate.py.
        base: the run whose model it finetunes.
        import_files: the files that register schemes, which a worker process imports first.
        num_weights: about how many the model has, once the run is checked.
    """

    place: str
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    base: "Run | None" = None
    import_files: tuple[str, ...] = field(default_factory=lambda: tuple(map(str, imported_files())))
    _key: str = field(default="", repr=False)
    num_weights: int = 0

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits of the hash of what determines the trained model."""
        if not self._key:
            facts = {k: _number(value) for k, value in self.settings.items() if k not in RESULT_NEUTRAL_FLAGS}
            base = self.base and self.base.key
            content = {"version": package_version("hf_relpos"), "settings": facts, "texts": _texts(facts), "base": base}
            schemes = imported_files(str(self.settings.get("pos_embedding_type")))
            content |= {"schemes": [_digest(str(file)) for file in schemes]} if schemes else {}
            self._key = _hash(content)
        return self._key

    @property
    def label(self) -> str:
        """A few words for a person."""
        words = [self.base.label] if self.base else [str(self.settings.get("pos_embedding_type", "linear_cpb"))]
        if self.base:
            changes = (self.settings.get(name) for name in ("pos_embedding_type", "rope_parameters"))
            words += [f"then {change}" for change in changes if change is not None]
        texts = (self.settings.get(name) for name in ("task", "dataset_name", "train_file"))
        words += [f"on {Path(str(text)).name}" for text in texts if text and not self.base]
        words += ["augmented"] if self.settings.get("position_start_augmentation") else []
        words += [f"{sampling} positions"] if (sampling := self.settings.get("position_sampling")) else []
        names = {"layer_types": "{}", "sliding_window": "window {}", "model_size": "{}", "block_size": "at {}"}
        names |= {"max_steps": "{} steps"} if self.base else {}
        words += [text.format(self.settings[name]) for name, text in names.items() if name in self.settings]
        return " ".join(words) + ("" if self.base else f" seed {self.settings.get('seed', 42)}")

    def folder(self, root: Path) -> Path:
        """The folder of the trained model."""
        return root / "runs" / self.key

    def result(self, root: Path) -> Path:
        """The file of its evaluation: another evaluation does not train the model again."""
        facts = {k: _number(value) for k, value in self.evaluation.items() if k not in RESULT_NEUTRAL_FLAGS}
        facts |= {"texts": texts} if (texts := _texts(facts)) else {}
        return self.folder(root) / f"evaluation-{_hash(facts)[:8]}" / RESULT


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _number(value: Any) -> Any:
    """YAML reads 3e-3 as a word and 0.003 as a number; a run is the same by either."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _texts(flags: dict[str, Any]) -> dict[str, str]:
    """→ the hash of each text that flags name on this machine; a data set of the Hub has none."""
    named = {name: str(flags[name]) for name in SOURCE_FLAGS if flags.get(name)}
    is_local = {name: name != "dataset_name" or Path(path).is_dir() for name, path in named.items()}
    return {name: _digest(path) for name, path in named.items() if is_local[name]}


def _digest(path: str) -> str:
    """Hash of a file, or of all files of a folder."""
    paths = sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)]
    digest = hashlib.sha256()
    for each in paths:
        digest.update(each.name.encode())
        digest.update(_file_digest(each, *_stamp(each)))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@cache
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """Read once, as long as size and time stay: the state of all runs is asked for every second."""
    return bytes.fromhex(content_hash(path))


# --- the file


def load_experiment(path: str, scale: float = 1.0) -> list[Run]:
    """The runs that a YAML file states.

    The file has the sections `train`, `evaluate` and `finetune` (flags of the scripts of these names) and `grid` (one
    dictionary or several, flag → list of values): each dictionary of the grid is multiplied out, and so are the lists
    of `finetune`, whose runs start from each trained model. Bases come before the runs that start from them. It may
    have `import_file`, a Python file or several that register schemes.

    Args:
        path: the file.
        scale: factor of the numbers of steps and of evaluation windows.

    Raises:
        ValueError: for a file that cannot be read, an unknown key, scheme or size, a grid without runs, or two entries
            that are the same run, naming the place in the file.
    """
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"`scale` must be above 0, got {scale}.")
    content = _read_file(path)
    runs = list(_trained(path, content, scale))
    if not runs:
        raise ValueError(f"{path}: `grid` is empty: it must list values of at least one flag.")
    if content.get("finetune"):
        runs += _finetuned(path, content["finetune"], runs, scale)
    check_runs(runs, drop_repeats=scale < 1)
    return runs


def _read_file(path: str) -> dict[str, Any]:
    content = read_yaml(path, "experiment")
    if not isinstance(content, dict):
        raise ValueError(f"experiment {path!r} must hold a dictionary with a `grid`.")
    import_schemes(as_list(content.pop("import_file", None)))
    unknown = sorted(map(str, set(content) - set(SECTIONS)))
    if unknown:
        raise ValueError(
            f"{path}: unknown section {unknown[0]!r}, must be one of {list(SECTIONS)}{nearest(unknown[0], SECTIONS)}."
        )
    return content


def _trained(path: str, content: dict[str, Any], scale: float) -> Iterator[Run]:
    """The runs of `grid`, which are trained from scratch."""
    grids = content.get("grid")
    grids = grids if isinstance(grids, list) else [grids]
    train, evaluation = (_section(path, name, content.get(name) or {}) for name in ("train", "evaluate"))
    for index, grid in enumerate(grids):
        place = f"grid[{index}]" if len(grids) > 1 else "grid"
        for number, choice in enumerate(_multiply(path, place, _section(path, "grid", grid or {}, place))):
            settings = _scaled({**train, **choice}, scale)
            yield Run(f"{path}: {place}, entry {number + 1}", settings, _scaled(evaluation, scale))


def _finetuned(path: str, section: Any, bases: list[Run], scale: float) -> list[Run]:
    """The runs of `finetune`: each of its choices for each trained model."""
    section, runs = _section(path, "finetune", section), []
    section = {name: value if isinstance(value, list) else [value] for name, value in section.items()}
    for run, choice in itertools.product(bases, _multiply(path, "finetune", section)):
        inherited = {name: value for name, value in run.settings.items() if name in _names(DataArguments)}
        if {"task", *SOURCE_FLAGS} & choice.keys():  # another text, which is read by its own flags
            inherited = {name: value for name, value in inherited.items() if name not in TEXT_SETTINGS}
        settings = _scaled({**inherited, "seed": run.settings.get("seed", 42), **choice}, scale)
        place = f"{path}: finetune {choice} of {run.place.partition(': ')[2]}"
        runs.append(Run(place, settings, run.evaluation, run))
    return runs


def grid_settings(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The flags of each run of an experiment, as its file holds it, that is trained from scratch; unchecked."""
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
            raise ValueError(
                f"{path}: `{place}` holds an unknown flag: {key!r}{nearest(key, _names(*SECTIONS[name]))}."
            )
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
    numbers = {name: _number(value) for name, value in settings.items() if name in SCALED}
    counts = {name: value for name, value in numbers.items() if isinstance(value, (int, float)) and value >= 1}
    return settings | {name: max(min(value, SCALED[name]), round(value * scale)) for name, value in counts.items()}


def check_runs(runs: list[Run], drop_repeats: bool = False) -> None:
    """Parses all flags and makes sure that no two runs are the same; `drop_repeats` drops those that are.

    Raises:
        ValueError: naming the place of the run.
    """
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
            else:
                configs[run] = changed_config(configs[run.base], model_args, args.block_size)
                if args.extend_learned_positions:
                    configs[run].max_position_embeddings = max(configs[run].max_position_embeddings, args.block_size)
            check_size(configs[run])
            check_imported(configs[run])
            run.num_weights = about_num_weights(configs[run])
            flags = {**run.evaluation, "output_dir": "unused", "model_name_or_path": "unused"}
            tested, text = parse_values(EVALUATE_TYPES, flags)
            # runs with and without a learned table are read at the same lengths
            lengths = check_lengths(tested.eval_lengths or default_lengths(args.block_size), configs[run])
            task = None if any(getattr(text, name) for name in SOURCE_FLAGS) else text.task or data_args.task
            check_flags(tested, lengths, task, tested.train_length or args.block_size)
            key = run.key
            run.result(Path())  # reads the texts that it names
        except (ValueError, OSError) as error:
            raise ValueError(f"{run.place}: {error}") from error
        if key in places and drop_repeats:
            runs.remove(run)
        elif key in places:
            raise ValueError(f"{run.place} is the same run as {places[key].place}.")
        places.setdefault(key, run)
