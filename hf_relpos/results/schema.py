"""What result files and `training.json` must look like for tables, plots and cards to be made of them: JSON Schemas.

Further keys are allowed everywhere.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any


def _object(properties: dict[str, Any], required: str = "", nullable: bool = False) -> dict[str, Any]:
    kind = ["object", "null"] if nullable else "object"
    return {"type": kind, "properties": properties, "required": required.split()}


def _by_number(values: dict[str, Any], at_least: int = 0) -> dict[str, Any]:
    """A dictionary whose keys are positive whole numbers."""
    pattern = {"^[1-9][0-9]{0,8}$": values}
    return {"type": "object", "patternProperties": pattern, "additionalProperties": False, "minProperties": at_least}


LIMIT = 1e100
NUMBER = {"type": "number", "minimum": -LIMIT, "maximum": LIMIT}
NUMBER_OR_NULL = {**NUMBER, "type": ["number", "null"]}
POSITIVE = {"type": "number", "exclusiveMinimum": 0, "maximum": LIMIT}
COUNT = {"type": "integer", "minimum": 0, "maximum": LIMIT}
COUNT_OR_NULL = {**COUNT, "type": ["integer", "null"]}
TEXT, TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
ANY_OBJECT, OBJECT_OR_NULL = {"type": "object"}, {"type": ["object", "null"]}
TEXTS_OR_NULL = {"type": ["array", "null"], "items": TEXT}

HARDWARE = _object({"cpu": TEXT, "gpu": TEXT, "num_gpus": COUNT, "cores": COUNT_OR_NULL}, "cpu")
MACHINE = {**HARDWARE, "required": ["cpu", "cores"], "dependentRequired": {"gpu": ["num_gpus"]}}
CORPUS = _object(
    {
        **{"name": TEXT, "split": TEXT, "fingerprint": TEXT_OR_NULL, "num_windows": COUNT_OR_NULL},
        "opening": TEXT_OR_NULL,
        **dict.fromkeys(("flags", "files", "splits", "read"), OBJECT_OR_NULL),
    },
    "name",
)
PAIR = {"type": "array", "minItems": 2, "maxItems": 2}
MADE = _object({"name": TEXT, "script": TEXT, "flags": ANY_OBJECT}, "name script flags")
RECORD = _object(
    {
        "pos_embedding_type": TEXT,
        "pos_embedding_kwargs": OBJECT_OR_NULL,
        "rope_parameters": OBJECT_OR_NULL,
        "position_sampling": TEXT_OR_NULL,
        "layer_types": TEXTS_OR_NULL,
        "sliding_window": COUNT_OR_NULL,
        "train_length": COUNT_OR_NULL,
        "base_train_length": COUNT_OR_NULL,
        "base_model": TEXT_OR_NULL,
        "seed": {"type": "integer"},
        "data_seed": {"type": ["integer", "null"]},
        "shape": _object({"num_hidden_layers": COUNT, "hidden_size": COUNT}, "num_hidden_layers hidden_size", True),
        **dict.fromkeys(("num_parameters", "num_steps", "num_processes", "tokens_per_step", "num_tokens"), COUNT),
        **dict.fromkeys(("seconds", "tokens_per_second", "peak_memory_mib"), NUMBER),
        **dict.fromkeys(("train_loss", "validation_loss", "passes"), NUMBER_OR_NULL),
        "recipe": ANY_OBJECT,
        "script": TEXT,
        "flags": ANY_OBJECT,
        "log": {"type": "array", "items": _object({"step": COUNT, "loss": NUMBER, "eval_loss": NUMBER}, "step")},
        "corpus": CORPUS,
        "changes": _object({"fields": {"type": "object", "additionalProperties": PAIR}}, "fields", True),
        "base_edits": {"type": "object", "additionalProperties": PAIR},
        "history": {"type": "array", "items": MADE},
        "resume": _object({"values": ANY_OBJECT}),
        "versions": ANY_OBJECT,
        "hardware": HARDWARE,
    }
)
# of training.json; what a result repeats of it may be less
RECORD_KEYS = "pos_embedding_type train_length seed data_seed num_steps num_tokens tokens_per_step recipe corpus"
RECORD_KEYS += " seconds tokens_per_second peak_memory_mib"
TRAINING_FILE = {
    **RECORD,
    "properties": {**RECORD["properties"], "hardware": MACHINE},
    "required": RECORD_KEYS.split(),
}

ESTIMATE = {"standard_error": NUMBER_OR_NULL}
LOSSES = _object(
    {"loss": NUMBER, "perplexity": POSITIVE, "median_loss": NUMBER, "num_tokens": COUNT}, "loss perplexity"
)
SCORE = _object({"score": NUMBER, "loss": NUMBER, "standard_error": NUMBER}, "score loss standard_error")
SCORES = {**SCORE, "properties": {**SCORE["properties"], "kinds": {**OBJECT_OR_NULL, "additionalProperties": SCORE}}}
RESULT = {
    "model": TEXT_OR_NULL,
    "pos_embedding_type": TEXT_OR_NULL,
    "seed": {"type": ["integer", "null"]},
    "train_length": {**COUNT_OR_NULL, "minimum": 1},
    "versions": ANY_OBJECT,
    "hardware": HARDWARE,
    "corpus": CORPUS,
    "flags": OBJECT_OR_NULL,
    "edited_since_training": {**OBJECT_OR_NULL, "additionalProperties": PAIR},
    "training": {**RECORD, "type": ["object", "null"]},
    "distance_bias": _object({"distances": {"type": "array"}, "layers": {"type": "array"}}, "distances layers", True),
}
TEXT_RESULT = _object(
    {
        **RESULT,
        "lengths": _by_number(LOSSES, 1),
        "loss_by_position": {"type": ["array", "object"]},
        "sliding_baseline": LOSSES,
        "in_context_score": _by_number(_object({"score": NUMBER, **ESTIMATE}, "score standard_error", True)),
        "slope": _object({"slope": NUMBER, **ESTIMATE}, "slope standard_error", True),
    }
)
TASK_RESULT = _object({**RESULT, "task": TEXT, "score_name": TEXT, "lengths": _by_number(SCORES, 1)})


@cache
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(globals()[name])


def check_schema(value: Any, name: str, where: str) -> None:
    """Raises `ValueError`, beginning with `where` and naming the field, unless a value fits the schema of that name,
    one of "TRAINING_FILE", "TEXT_RESULT" and "TASK_RESULT"."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(name).iter_errors(value))
    if error is not None:
        path = ".".join(map(str, error.absolute_path))
        message = error.message if len(error.message) < 200 else f"{error.message[:100]} .. {error.message[-90:]}"
        raise ValueError(f"{where}: {f'`{path}`: ' if path else ''}{message}.")
    if name == "TEXT_RESULT":
        _check_positions(value["loss_by_position"], where)
    for index, layer in enumerate((value.get("distance_bias") or {}).get("layers", [])):
        if not isinstance(layer, list) or not all(
            _are_numbers(head, len(value["distance_bias"]["distances"])) for head in layer
        ):
            raise ValueError(f"{where}: `distance_bias.layers.{index}` must hold a number per head and distance.")


def _check_positions(losses: Any, where: str) -> None:
    """A loss or null per position, or the bins that `write_results` stores."""
    if isinstance(losses, dict):
        positions = losses.get("positions")
        fits = _are_numbers(positions) and bool(positions) and min(positions) > 0
        fits = fits and _are_numbers(losses.get("losses"), len(positions))
    else:
        found = [loss for loss in losses[1:] if loss is not None]
        fits = bool(found) and _are_numbers(found)
    if not fits:
        raise ValueError(f"{where}: `loss_by_position` must hold the losses of positions.")


def _are_numbers(values: Iterable[Any], count: int | None = None) -> bool:
    is_list = isinstance(values, list) and len(values) == (len(values) if count is None else count)
    return is_list and all(type(value) in (int, float) and abs(value) < LIMIT for value in values)
