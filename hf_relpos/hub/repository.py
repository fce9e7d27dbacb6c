"""The repository of a saved model: which files it holds, that they are whole, and that they tell no secret."""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ..environment import write_bytes, writing
from ..file_reading import read_json, read_text_file
from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import (
    RelPosForCausalLM,
    RelPosForQuestionAnswering,
    RelPosForSequenceClassification,
    RelPosForTokenClassification,
    RelPosModel,
)
from ..model.saved_code import AUTO_MAP, foreign_schemes, saved_code
from ..model_loading import (
    NOT_FINITE,
    check_folder,
    describe_edits,
    edited_fields,
    load_model,
    load_tokenizer_of,
    not_finite,
)
from ..results.plots import plot_results, plot_scores
from ..results.result_file import read_result
from ..results.training_record import TRAINING_RECORD, read_record
from .leaks import check_inside, check_texts
from .model_card import CARD, is_generated, model_card, origin_of, signed


logger = logging.getLogger(__name__)

MODELS = {
    cls.__name__: cls
    for cls in (
        RelPosModel,
        RelPosForCausalLM,
        RelPosForSequenceClassification,
        RelPosForTokenClassification,
        RelPosForQuestionAnswering,
    )
}

RESULT = "results.json"
WEIGHTS, WHOLE, INDEX = "*.safetensors", "model.safetensors", "model.safetensors.index.json"
# what a repository holds besides the weights, the code, the results and the card
FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    TRAINING_RECORD,
)
# weights that run code when they are read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# state of the Trainer, which is never pushed
TRAINER_STATE = ("training_args.bin", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def repository_files(
    folder: str | Path,
    repo_id: str | None = None,
    results: Sequence[str] = (),
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
) -> dict[str, Path | bytes]:
    """All files of the repository that a saved model makes.

    Args:
        folder: of a saved model of the family.
        repo_id: what it will be called; the folder's name by default.
        results: result files of `hf-relpos evaluate` besides those in the folder.
        base_model, license, tags: as in `model_card`.

    Returns:
        path in the repository → file, or content; the same for the same folder.

    Raises:
        ValueError: if the folder holds no model of the family or pickled weights; if it was imported and its licence or
            its origin is not known; if a result is of another model; if a file is a link to somewhere else; if a text
            file holds a key of somebody or a path of a user's folder; if its scheme is not the one of its record.
    """
    folder = Path(folder)
    for name in ("config.json", *FILES, CARD):
        if (folder / name).exists():
            check_inside(folder / name, folder)
    config = _read_config(folder)
    if base_model:
        validate_repo_id(base_model)
    _, license = origin_of(config, base_model, license)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"`license` must be one of the Hub's names, such as 'apache-2.0', got {license!r}.")
    files: dict[str, Path | bytes] = {path.name: path for path in _weight_files(folder)}
    files |= {name: folder / name for name in FILES if (folder / name).is_file()}
    files |= saved_code(config["pos_embedding_type"])
    config |= {"auto_map": AUTO_MAP}
    files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    record = read_record(str(folder))
    if edits := edited_fields(folder):
        raise ValueError(
            f"{str(folder)!r}: {describe_edits(edits)}; a card would tell of another training than the model had. "
            "`hf-relpos finetune` changes a scheme and records it."
        )
    found = _find_results(folder, results, config, record)
    pictures = []
    for place, (path, result) in found.items():
        files[place] = path
        picture, content = draw_result(result)
        pictures.append(str(Path(place).with_name(picture)))
        files[pictures[-1]] = content
    card = folder / CARD
    if card.is_file() and not is_generated(read_text_file(card, "the card")):
        files[CARD] = card
        logger.warning(f"{CARD} was edited: it is kept as it is, whatever has been evaluated since.")
    else:
        name = repo_id.rpartition("/")[2] if repo_id else folder.resolve().name
        read = [result for _, result in found.values()]
        about = (repo_id, base_model, license, tags)
        chats = _has_chat_template(folder)
        written = model_card(config, name, record, read, pictures, *about, has_chat_template=chats)
        files[CARD] = signed(written).encode()
    check_texts(files, folder)
    return files


def _has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a folder has a template for chats."""
    fields = folder / "tokenizer_config.json"
    own = fields.is_file() and read_json(fields).get("chat_template")
    return bool(own) or (folder / "chat_template.jinja").is_file()


def write_card(folder: str | Path, repo_id: str | None = None) -> None:
    """Writes the card of a saved model to its folder, with the results that lie there; one that was edited is kept, and
    a line says why where none can be written.

    Args:
        folder, repo_id: as in `repository_files`.
    """
    folder = Path(folder)
    try:
        card = repository_files(folder, repo_id)[CARD]
    except Exception as error:  # the model and its results are saved already
        logger.warning(f"No card was written: {error}")
        return
    if isinstance(card, bytes):
        write_bytes(folder / CARD, card)  # half of one would pass for one that was edited


def draw_result(result: dict[str, Any]) -> tuple[str, bytes]:
    """→ name and content of the picture of a result: loss by position or, of a task, score by length."""
    with tempfile.TemporaryDirectory() as drawn:
        path = (plot_scores if "task" in result else plot_results)([result], Path(drawn))[0]
        return path.name, path.read_bytes()


def _read_config(folder: Path) -> dict[str, Any]:
    """→ the configuration of a folder that holds safe weights of the family."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a saved model: there is no such folder.")
    check_folder(str(folder), "the folder")
    for pattern in PICKLES:
        for path in folder.glob(pattern):
            if not any(path.match(state) for state in TRAINER_STATE):
                raise ValueError(
                    f"{path.name!r} is pickled, which runs code when it is read: save the weights as safetensors."
                )
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if config.get("model_type") != RelPosConfig.model_type or architecture not in list(MODELS):
        raise ValueError(
            f"{str(folder)!r} must hold a model of the family ('relpos'), got model_type {config.get('model_type')!r}."
        )
    if not isinstance(config.get("pos_embedding_type"), str):
        raise ValueError(f"'config.json' of {str(folder)!r} must name its `pos_embedding_type`.")
    if foreign := foreign_schemes(config["pos_embedding_type"]):
        name, (module, reason) = next(iter(foreign.items()))
        raise ValueError(
            f"nobody could load it: the position embedding {name!r} is defined in {module!r}, outside of it, "
            f"and {reason}."
        )
    return config


def _weight_files(folder: Path) -> list[Path]:
    """→ those of the weights that are there, by the index or `model.safetensors`; others in the folder stay there."""
    named, whole = _named_weights(folder / INDEX), folder / WHOLE
    if WHOLE not in named and whole.is_file():
        raise ValueError(f"{WHOLE!r} and {INDEX!r} are both there, with other weights: delete what is out of date.")
    found = [folder / name for name in named if (folder / name).is_file()]
    for path in found:
        check_inside(path, folder)
    if others := sorted({path.name for path in folder.glob(WEIGHTS)} - set(named)):
        logger.warning(f"Not published, since they are not among the weights: {', '.join(others)}.")
    return found


def _named_weights(index: Path | None) -> list[str]:
    """→ the names of the weight files, as the index has them if there is one."""
    if index is None or not index.is_file():
        return [WHOLE]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{INDEX!r} cannot be read: its `weight_map` must map weights to files.")
    named = sorted(set(weight_map.values()))
    for name in named:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX!r} must name safetensors files of its folder, got {name!r}.")
    return named


def check_weights(files: dict[str, Path | bytes]) -> None:
    """Raises `ValueError` if the weights of a repository are missing in whole or in part, cut off, or not finite."""
    named = _named_weights(files.get(INDEX))
    if missing := sorted(set(named) - set(files)):
        raise ValueError(f"the weights are not whole: {missing[0]!r} is missing.")
    for name in named:
        try:
            if key := not_finite(files[name]):
                raise ValueError(f"the weights are not finite: {key!r} in {name!r} {NOT_FINITE}.")
        except SafetensorError as error:
            raise ValueError(f"the weights are not whole: {name!r} cannot be read: {error}") from error


def check_loads(folder: str | Path) -> None:
    """Loads the model and the tokenizer of a folder, to see that others can.

    Raises:
        ValueError: if weights are missing, spoilt or too many, or if there is no tokenizer.
    """
    architecture, *_ = _read_config(Path(folder))["architectures"]
    load_model(str(folder), MODELS[architecture], "the folder")
    load_tokenizer_of(str(folder), f"{str(folder)!r} holds no tokenizer that can be loaded")


def folder_results(folder: Path) -> list[Path]:
    """The result files of a saved model's folder, at most one folder down."""
    return sorted(path for path in (*folder.glob(RESULT), *folder.glob(f"*/{RESULT}")) if path.is_file())


def _find_results(
    folder: Path, others: Sequence[str], config: dict[str, Any], record: dict[str, Any]
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """→ path in the repository → result file and content: those of the folder and others."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    inside = folder_results(folder)
    for path in inside:
        check_inside(path, folder)
    paths = {path.resolve(): path for path in inside}
    paths |= {place: path for path in map(Path, others) if (place := path.resolve()) not in paths}  # each file once
    for path in paths.values():
        place = str(path.relative_to(folder)) if path in inside else f"{path.resolve().parent.name}/{RESULT}"
        if place in found:
            raise ValueError(f"two results would be stored at {place!r}: rename the folder of {str(path)!r}.")
        result = read_result(path)
        _check_result(path, result, config, record)
        found[place] = (path, result)
    return found


def _check_result(path: Path, result: dict[str, Any], config: dict[str, Any], record: dict[str, Any]) -> None:
    """Refuses a result of another model than that of the folder, as far as the two tell."""
    training = result.get("training") or {}
    pairs = {name: (training[name], record[name]) for name in training if name in record}
    for name in ("pos_embedding_type", "train_length"):
        pairs[name] = (result[name], config.get(name))
    for name, (found, expected) in pairs.items():
        if found != expected:
            message = f"{str(path)!r} is the result of another model: its `{name}` is {found!r}, not {expected!r}."
            raise ValueError(message)


def write_files(files: dict[str, Path | bytes], folder: str | Path) -> None:
    """Writes them to a folder, whole or not at all; raises `ValueError` if there is one."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"`output_dir` {str(folder)!r} exists: choose another.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    where = writing("`output_dir`", folder)
    with where, tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
        part = Path(parent) / folder.name
        for name, content in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (part / name).write_bytes(content)
            else:
                shutil.copyfile(content, part / name)
        part.rename(folder)
