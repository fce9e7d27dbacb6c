"""Checkpoints: which one to resume from, and whether all its parts are whole."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainingArguments

from ..file_reading import read_json, reading
from ..model_loading import not_finite
from ..results.training_record import TRAINING_RECORD
from .lora import TRAINED_WEIGHTS, has_lora, load_trained_weights


STATE = "trainer_state.json"
RECIPE = "recipe.json"


def checkpoint_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state of the Trainer in a checkpoint, with `global_step`; raises `ValueError` if it cannot be read."""
    state = read_json(Path(checkpoint) / STATE, allow_nan=True)
    if type(state.get("global_step")) is not int or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{STATE} is that of no run")
    return state


def damage(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or `None` if weights, optimizer, schedule, random numbers and
    state are all there and whole, and the weights finite."""
    folder = Path(checkpoint)
    try:
        checkpoint_state(folder)
        read_json(folder / "config.json")
        num_processes = 1
        if (folder / RECIPE).exists():
            num_processes = read_json(folder / RECIPE).get("num_processes", 1)
            if type(num_processes) is not int or num_processes not in range(1, 2**20):
                raise ValueError(f"{RECIPE}: `num_processes` must be a number of processes, got {num_processes!r}")
        _check_weights(folder)
        _check_archive(folder, "optimizer.pt", "optimizer.bin", "optimizer_0")
        _check_archive(folder, "scheduler.pt")
        for rank in range(num_processes):
            _check_archive(folder, "rng_state.pth" if num_processes == 1 else f"rng_state_{rank}.pth")
        if (folder / "scaler.pt").exists():
            _check_archive(folder, "scaler.pt")
    except (ValueError, OSError) as error:
        return str(error)
    return None


def weights_damage(folder: Path) -> str | None:
    """What is wrong with the configuration and the weights of a saved model, or `None`."""
    try:
        read_json(folder / "config.json")
        _check_weights(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index.name} names no weights")
        names = sorted(set(shards.values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:  # what FSDP leaves
        _check_archive(folder, "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0", missing="model.safetensors")
        return
    if (folder / RECIPE).exists() and "lora_rank" in read_json(folder / RECIPE).get("values", {}):
        names.append(TRAINED_WEIGHTS)
        if not (folder / TRAINED_WEIGHTS).exists():
            raise ValueError(f"{TRAINED_WEIGHTS} is missing")
    for name in names:
        try:
            bad = not_finite(folder / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} cannot be read") from error
        if bad:
            raise ValueError(f"{name} holds weights that are not finite ({bad})")


def _check_archive(folder: Path, *names: str, missing: str | None = None) -> None:
    """Raises `ValueError` unless the first of the names that exists is what `torch.save` wrote, with its checksums, or
    a folder of a distributed checkpoint."""
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise ValueError(f"{missing or names[0]} is missing")
    if found.is_dir():
        if not (found / ".metadata").is_file():
            raise ValueError(f"{found.name} has no .metadata")
        return
    try:
        with zipfile.ZipFile(found) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{found.name} cannot be read") from error
    if damaged:
        raise ValueError(f"{found.name} is damaged")


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: `--resume_from_checkpoint last` is the newest whole one in the output folder.

    A line names each newer one that is damaged. `None` for a new run, and for one that is finished and has none.

    Raises:
        ValueError: if there is none, if the one that is named is damaged, or if the output folder holds a run and none
            is to be resumed.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        runs = [path.name for path in folder.glob("*") if path.name.startswith("checkpoint-") or path.suffix == ".json"]
        if runs:
            raise ValueError(
                f"`output_dir` {args.output_dir!r} already holds a run ({sorted(runs)[0]}): choose another, or "
                "resume with --resume_from_checkpoint last."
            )
        others = sorted(path.name for path in folder.glob("[!.]*") if not path.name.startswith(("log", "evaluation")))
        if others and args.process_index == 0:
            print(f"note: {args.output_dir!r} holds other files ({others[0]!r}); the model is saved among them")
        return None
    if str(wanted).lower() in ("last", "true"):
        return _newest_whole(folder, args.process_index == 0)
    if not (Path(wanted) / STATE).is_file():
        raise ValueError(f"`resume_from_checkpoint` {str(wanted)!r} is not a checkpoint of a run.")
    reason = damage(wanted)
    if reason:
        raise ValueError(f"`resume_from_checkpoint` {str(wanted)!r} is damaged: {reason}.")
    return str(wanted)


def _newest_whole(folder: Path, speak: bool) -> str | None:
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    if not found and (folder / TRAINING_RECORD).is_file():
        return None
    if not found:
        raise ValueError(f"`resume_from_checkpoint`: {str(folder)!r} holds no checkpoint.")
    path, reasons = newest_whole(folder)
    if path is not None:
        if reasons and speak:
            print(f"damaged: {'; '.join(reasons)}; resuming from {path}")
        return str(path)
    if (folder / TRAINING_RECORD).is_file():
        return None
    raise ValueError(
        f"`resume_from_checkpoint`: {str(folder)!r} holds no whole checkpoint ({'; '.join(reasons)}); to start anew, "
        "choose another `output_dir` or remove them."
    )


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """→ the newest whole checkpoint of an output folder, and what is wrong with each newer one."""
    reasons = []
    for path in sorted((path for path in folder.glob("checkpoint-*") if path.is_dir()), key=_step, reverse=True):
        reason = damage(path)
        if reason is None:
            return path, reasons
        reasons.append(f"{path}: {reason}")
    return None, reasons


def load_weights(model: torch.nn.Module, checkpoint: str | Path) -> None:
    """Loads the weights of a whole checkpoint into a model that is not wrapped; raises `ValueError` for shards of FSDP,
    which only the processes that wrote them can put together."""
    folder = Path(checkpoint)
    if has_lora(model):
        load_trained_weights(model, folder)
        return
    index, state = folder / "model.safetensors.index.json", {}
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    if not (folder / names[0]).exists():
        if not (folder / "pytorch_model_fsdp.bin").exists():
            raise ValueError(f"{str(folder)!r} holds shards of FSDP; train with FULL_STATE_DICT.")
        state = torch.load(folder / "pytorch_model_fsdp.bin", map_location="cpu", weights_only=True)
    else:
        for name in names:
            state |= load_file(folder / name)
    with reading(f"{str(folder)!r} holds the weights of another model"):
        left = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if left.unexpected_keys or set(left.missing_keys) - tied:
        raise ValueError(f"{str(folder)!r} holds the weights of another model: {[*left.unexpected_keys, *left[0]][0]}.")


def _step(checkpoint: Path) -> int:
    """The step that the state tells, else the one in the name, else -1."""
    try:
        return checkpoint_state(checkpoint)["global_step"]
    except ValueError:
        number = checkpoint.name.rpartition("-")[2]
        return int(number) if number.isdecimal() else -1
