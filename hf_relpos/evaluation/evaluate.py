"""The evaluation of a saved model: its arguments, and the result file with its plots."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..environment import check_at_least_1, check_room, hardware, peak_memory_mib, place_name, versions, write_json
from ..model_corpus import ModelCorpus, UsedCorpus
from ..model_loading import edited_fields, load_model, load_model_tokenizer
from ..pretrained.families import pretraining_length
from ..results.plots import plot_results, plot_scores
from ..results.training_record import TRAINING_RECORD, given_flags, read_record
from ..scheme_files import import_flags
from ..tasks.arguments import DataArguments
from ..tasks.base import make_task
from .command import EvaluationArguments
from .loss_by_length import (
    check_baseline,
    check_lengths,
    check_stride,
    evaluate_lengths,
    evaluate_sliding,
    evaluation_mode,
)
from .task_scores import evaluate_task


DEFAULT_LENGTH = 128  # tokens, and 2, 4 and 8 times as many
RESULT_BYTES = 2**19  # about what results.json and two pictures take


def evaluate_model(args: EvaluationArguments, data_args: DataArguments) -> dict[str, Any]:
    """Evaluates a model and writes `results.json` and the plots to `args.output_dir`.

    Returns:
        the result, as in `results.json`.

    Raises:
        ValueError: for wrong flags, data or models, or if no data is named and the model's own is gone or changed;
            nothing is written then.
    """
    folder = Path(args.output_dir)
    if (folder / "results.json").exists() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"`output_dir` {args.output_dir!r} already holds a result, or is a file: choose another.")
    check_flags(args, None if args.eval_lengths is None else check_lengths(args.eval_lengths), data_args.task)
    check_room("output_dir", folder, RESULT_BYTES, "a result")
    kwargs = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    model = load_model(args.model_name_or_path, AutoModelForCausalLM, dtype=getattr(torch, args.dtype), **kwargs)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    own = ModelCorpus.read(args.model_name_or_path)
    data_args = own.fill(data_args)
    check_flags(args, task=data_args.task)
    tokenizer = load_model_tokenizer(data_args.tokenizer_name or args.model_name_or_path, model)
    record, edits = read_record(args.model_name_or_path), edited_fields(args.model_name_or_path)
    train_length = args.train_length or getattr(model.config, "train_length", None) or record.get("train_length")
    lengths = check_lengths(args.eval_lengths or default_lengths(train_length, model.config), model)
    train_length = train_length or pretraining_length(model.config)
    measure = _measure_text if data_args.task is None else _measure_task
    measured = measure(model, tokenizer, args, lengths, data_args, train_length, own)
    lengths = sorted(map(int, measured["lengths"]))
    args = replace(args, eval_lengths=args.eval_lengths or lengths)
    result = {
        "model": place_name(args.model_name_or_path),
        "pos_embedding_type": getattr(model.config, "pos_embedding_type", None),
        "seed": record.get("seed"),
        "train_length": train_length,
        **measured,
        "flags": import_flags(getattr(model.config, "pos_embedding_type", None)) | given_flags(args, data_args),
        "distance_bias": bias_curves(model, lengths[-1]),
        "attn_implementation": model.config._attn_implementation,
        "dtype": args.dtype,
        **({"edited_since_training": edits} if edits else {}),
        "training": {key: value for key, value in record.items() if key not in ("versions", "hardware")} or None,
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "versions": versions(),
        "hardware": hardware(),
    }
    (plot_results if data_args.task is None else plot_scores)([result], folder)
    write_json(folder / "results.json", result)  # last: a folder that has it is complete
    _update_card(Path(args.model_name_or_path), folder / "results.json")
    return result


def _update_card(model: Path, path: Path) -> None:
    """Puts a result into the card of the model in whose folder it lies."""
    has_card = (model / TRAINING_RECORD).is_file() and (model / "README.md").is_file()
    if has_card and path.parent.parent.resolve() == model.resolve():
        from ..hub.repository import write_card  # takes a second

        write_card(model)


def check_flags(
    args: EvaluationArguments,
    lengths: list[int] | None = None,
    task: str | None = None,
    train_length: int | None = None,
) -> None:
    """Raises `ValueError` for flags that no evaluation can follow, as far as it is known what is read.

    Args:
        args: the flags.
        lengths: evaluation lengths, sorted.
        task: the synthetic task, if it is one that is scored.
        train_length: the length the model was trained at.
    """
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {args.dtype!r}.")
    for name in ("max_windows", "tokens_per_batch", "train_length"):
        check_at_least_1(name, getattr(args, name))
    for name in ("stride", "sliding_baseline", "eval_split"):
        if task is not None and getattr(args, name):
            raise ValueError(f"`{name}` is for text, not for a task.")
    if lengths:
        _check_stride(args, lengths)
    if lengths and train_length and args.sliding_baseline:
        check_baseline(train_length, lengths[-1])


def _check_stride(args: EvaluationArguments, lengths: list[int]) -> None:
    if args.stride is not None:
        check_stride(args.stride, lengths[-1])


def default_lengths(train_length: int | None, config: Any = None) -> list[int]:
    """The lengths that a model is read at where none are named: 128 to 1024, or up to 8 times a training length that is
    shorter; of these the ones that its learned table has.

    Args:
        train_length: `None` if it is not known.
        config: of the model.
    """
    found = [min(train_length or DEFAULT_LENGTH, DEFAULT_LENGTH) * factor for factor in (1, 2, 4, 8)]
    limit = getattr(config, "max_positions", None)
    return [length for length in found if limit is None or length <= limit] or [limit]


def _measure_text(
    model: Any,
    tokenizer: Any,
    args: EvaluationArguments,
    lengths: list[int],
    data_args: DataArguments,
    train_length: int | None,
    own: ModelCorpus,
) -> dict[str, Any]:
    """Losses by length and by position on the documents of a corpus."""
    from ..data.tokens import evaluation_documents  # takes a second, which --help and tasks do not need

    corpus, used = own.load(data_args)
    split, documents = evaluation_documents(corpus, data_args, tokenizer, args.eval_split)
    if args.eval_lengths is None:
        longest = max(map(len, documents), default=0)
        lengths = [length for length in lengths if length <= longest] or lengths
        _check_stride(args, lengths)
    found = evaluate_lengths(
        model, documents, lengths, train_length, args.tokens_per_batch, args.max_windows, args.sliding_baseline
    )
    numbers = {name: found.pop(name) for name in ("num_documents", "num_windows", "num_short_documents")}
    if args.stride is not None:
        found["sliding_window"] = {
            str(length): evaluate_sliding(model, documents, length, args.stride, args.tokens_per_batch)
            for length in lengths
            if length > args.stride
        }
    return {**found, "corpus": _corpus_facts(own, used, split, numbers)}


def _measure_task(
    model: Any,
    tokenizer: Any,
    args: EvaluationArguments,
    lengths: list[int],
    data_args: DataArguments,
    train_length: int | None,
    own: ModelCorpus,
) -> dict[str, Any]:
    """Scores by length on rows of a synthetic task."""
    task, num_rows = make_task(data_args.task, tokenizer), args.max_windows or 100
    used = UsedCorpus.of_task(task.name, task.fingerprint)
    own.check(used, data_args)
    scores = evaluate_task(model, task, lengths, num_rows, args.tokens_per_batch)
    return {
        "task": task.name,
        "score_name": task.score_name,
        "lengths": scores,
        "corpus": _corpus_facts(own, used, "test", {"num_windows": num_rows}),
    }


def _corpus_facts(own: ModelCorpus, used: UsedCorpus, split: str, numbers: dict[str, int]) -> dict[str, Any]:
    """What a result says of its text, and whether it is of the corpus that the model was trained on."""
    return {
        **{name: used.record[name] for name in ("name", "fingerprint", "files", "read") if name in used.record},
        "split": split,
        "split_fingerprint": used.record.get("splits", {}).get(split),
        "same_corpus_as_training": own.is_same(used, split),
        "trained_on": own.name,
        **numbers,
    }


def bias_curve_limit(layers: Iterable[Any]) -> float:
    """The largest position of a query whose bias in these layers depends on the distance only; infinity without one."""
    schemes = chain(*(layer.self_attn.position_embeddings.values() for layer in layers))
    limits = [float(limit) for limit in (scheme.max_table_position() for scheme in schemes) if limit is not None]
    return math.floor(min(limits)) if limits else math.inf


def bias_curves(model: Any, length: int) -> dict[str, Any] | None:
    """The bias by distance that a model of this family has learned, or `None` for one that has none.

    Returns:
        `distances`: from 0 to `length` − 1, ever sparser; `layers`: for each layer and head the biases there.
    """
    if not getattr(model.config, "has_distance_table", False):
        return None
    length = int(min(length, bias_curve_limit(model.base_model.layers) + 1))
    steps = range(8 * length.bit_length() + 1)
    distances = sorted({distance for step in steps if (distance := round(2 ** (step / 8)) - 1) < length})
    with evaluation_mode(model):
        tables = model.base_model.distance_bias(length)
    return {"distances": distances, "layers": tables[..., distances].cpu().tolist()}
