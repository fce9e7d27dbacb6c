"""Model cards: what a model is, how it does at which length and where it fails, from its files and nothing else."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..model.saved_code import AUTO_MAP, carried_names
from ..model.scheme_registry import position_embedding_classes
from ..origin import known_origin, missing_flags, repository_of
from ..results.result_file import escape_markdown
from ..results.training_record import command_line
from ..scheme_docs import PARTS, link_papers, read_scheme
from .card_evaluation import corpus_name, eval_results, evaluation_section, is_built_in, seeds_in_words


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


def model_card(
    config: dict[str, Any],
    name: str,
    record: dict[str, Any] | None = None,
    results: Sequence[dict[str, Any]] = (),
    pictures: Sequence[str] = (),
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    commands: Sequence[str] | None = None,
    other_seeds: Sequence[dict[str, Any]] = (),
    has_chat_template: bool = False,
) -> ModelCard:
    """The card of a model.

    Args:
        config: fields of its configuration, as config.json holds them.
        name: what to call it.
        record: what `training.json` holds.
        results: what its result files hold.
        pictures: for each result, the picture's path beside the card.
        repo_id: where it can be loaded from; by default a folder of its name.
        base_model: the repository of the model that it was finetuned from, or "none" if it was never on the Hub; by
            default as recorded, or where it was imported from.
        license: of the weights, one of the Hub's names of licences; by default that of the model that was imported, or
            apache-2.0.
        tags: further ones for the Hub's search.
        commands: what was run; by default the commands that the record and the results give.
        other_seeds: results of the same setting with other seeds, for a card of all of them: `results` must be one
            then, and the card gives means over the seeds.
        has_chat_template: whether its tokenizer has one, in which a model that was converted is asked.

    Returns:
        a `huggingface_hub.ModelCard`; the same for the same arguments.

    Raises:
        ValueError: for a model that was imported from nobody knows where, or under no known licence.
    """
    origin, license = origin_of(config, base_model, license)
    record = record or {}
    base_model = repository_of(base_model) or record.get("base_model")
    if commands is None:
        commands = reproduction(name, record, results)
    evaluations = [[result, *other_seeds] for result in results]
    options = {field: record.get(field) for field in ("pos_embedding_kwargs", "rope_parameters")}
    repository = base_model if base_model and "/" in base_model else origin
    return ModelCard.from_template(
        _metadata(config, name, license, repository, tags, evaluations),
        template_path=str(TEMPLATE),
        name=escape_markdown(name),
        schemes=[scheme_facts(*item, {**options, **config}) for item in position_classes(config).items()],
        evaluations=[evaluation_section(runs, config, pictures[i : i + 1]) for i, runs in enumerate(evaluations)],
        scheme_files=carried_names(config["pos_embedding_type"]),
        commands="\n".join(commands) or None,
        names_files=any("_file " in line for line in commands),
        needs_sample=is_built_in(record.get("corpus")) or any(is_built_in(each.get("corpus")) for each in results),
        fence=_fence("\n".join(commands)),
        license=license,
        **_use(config, repo_id or name, record, results),
        is_chat=has_chat_template and not record.get("corpus"),
        **_training(config, [record, *(result["training"] for result in other_seeds)], results, base_model),
    )


def _metadata(
    config: dict[str, Any],
    name: str,
    license: str,
    base_model: str | None,
    tags: Sequence[str] | None,
    evaluations: Sequence[Sequence[dict[str, Any]]],
) -> ModelCardData:
    """What the Hub reads."""
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[_architecture(config)],
        license=license,
        tags=[*dict.fromkeys(("relpos", "position-embedding", *position_classes(config), *(tags or ())))],
        base_model=base_model,
        eval_results=[each for runs in evaluations for each in eval_results(runs)] or None,
    )


def _architecture(config: dict[str, Any]) -> str:
    (architecture,) = config.get("architectures") or ["RelPosForCausalLM"]
    return architecture


def _use(
    config: dict[str, Any], repo_id: str, record: dict[str, Any], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """How a model is loaded, and what it is asked to go on with."""
    architecture, corpus = _architecture(config), record.get("corpus") or {}
    is_of_task = "task" in (corpus.get("flags") or {}) or any("task" in result for result in results)
    auto_class = next(auto for auto, reference in AUTO_MAP.items() if reference.rpartition(".")[2] == architecture)
    return {
        "auto_class": auto_class,
        "generates": auto_class == "AutoModelForCausalLM" and not is_of_task,
        "repo_id": repo_id,
        "prompt": corpus.get("opening"),
        "begins": bool(corpus),
    }


def _training(
    config: dict[str, Any],
    records: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    base_model: str | None,
) -> dict[str, Any]:
    """What a model is and how it was made; of several seeds their records."""
    record = records[0]
    commit = (results[0] if results else record).get("versions", {}).get("commit")
    return {
        "summary": _summary(config, records, base_model),
        "training": _training_list(records) if record else None,
        "setting": _setting(records),
        "commit": _code(commit) if commit else None,
    }


def origin_of(
    config: dict[str, Any], base_model: str | None = None, license: str | None = None
) -> tuple[str | None, str]:
    """→ the repository that a model was imported from, if it was and there is one, and the licence of its weights.

    Args:
        config: fields of its configuration.
        base_model, license: what the user says of them.

    Raises:
        ValueError: if it was imported and one of the two is not known; a `base_model` of "none" says that it was never
            on the Hub.
    """
    imported_from = config.get("imported_from")
    if imported_from is None:
        return None, license or "apache-2.0"
    known = known_origin(imported_from, base_model, license)
    if missing := [f"`{name}`" for name, value in known.items() if not value]:
        raise ValueError(
            f"{' and '.join(missing)} must be given for a model that was imported (`model_type` "
            f"{imported_from.get('model_type')!r}), got None: `hf-relpos push` and `hf-relpos import` take "
            f"{missing_flags(known)}."
        )
    return repository_of(known["base_model"]), known["license"]


def signed(card: ModelCard | str) -> str:
    """→ the text of a card, with a hash at its end by which `is_generated` knows it."""
    text = str(card)
    return text + SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def is_generated(text: str) -> bool:
    """Whether a card is as `signed` or the Trainer of transformers wrote it, and may be replaced."""
    body = text.rpartition(SIGNATURE.partition("{")[0])[0]
    # the draft of transformers asks whoever completes it to remove this comment
    is_draft = "generated automatically according to the information the Trainer had access to" in text
    return is_draft or (bool(body) and text == signed(body))


# --- the scheme


def position_classes(config: dict[str, Any]) -> dict[str, type]:
    return position_embedding_classes(config["pos_embedding_type"])


def scheme_facts(name: str, scheme: type, config: dict[str, Any]) -> dict[str, str]:
    """What the docstring of a scheme says of a model of this configuration: `name`, `title`, `equation`, `text`."""
    read, rope_type = read_scheme(scheme), (config.get("rope_parameters") or {}).get("rope_type")
    points = [f"- **{part}**: {read[part]}" for part in PARTS if part in read]
    points += [f"- **{part}** ({rope_type}): {says}" for part, values, says in read["special"] if rope_type in values]
    text = _own_values("\n\n".join([*read["text"], "\n".join(points)]), scheme, config)
    return {"name": name, "title": read["title"], "equation": read["equation"], "text": link_papers(text)}


def _own_values(text: str, scheme: type, config: dict[str, Any]) -> str:
    """→ the text of a scheme, in which an option stands with the value of the model, or "by default"."""
    own = {**(config.get("rope_parameters") or {}), **(config.get("pos_embedding_kwargs") or {})}
    for name in scheme.defaults:
        value = str(own[name]) if name in own else None
        text = re.sub(
            rf"`{name}` (\d[\d.e-]*\d|\d)(?![\w.]*\w)",
            lambda found: f"`{name}` {value or f'by default {found[1]}'}",  # noqa: B023
            text,
        )
    return text


def _summary(config: dict[str, Any], records: Sequence[dict[str, Any]], base_model: str | None) -> str:
    record = records[0]
    number = record.get("num_parameters", 0)
    size = f" of {number / 1e6:.1f}M parameters" if number > 1e6 else f" of {number:,} parameters" if number else ""
    lines = [f"A causal language model{size} whose position scheme is `{config['pos_embedding_type']}`."]
    if "/" in config["pos_embedding_type"]:
        lines.append(
            "The schemes joined by `/` alternate layer by layer, beginning again with the first after the last."
        )
    if config.get("sliding_window"):
        types = config.get("layer_types") or ["sliding_attention"]
        slides = ", ".join(str(index) for index, name in enumerate(types) if name == "sliding_attention")
        lines.append(f"Layers with a sliding window ({slides}) see {config['sliding_window']} tokens.")
    if record.get("num_steps"):
        length = record.get("block_size", record["train_length"])
        lines.append(
            f"Trained at a length of {length} tokens on {record['num_tokens']:,} tokens of the split train of "
            f"{corpus_name(record['corpus'])}, {seeds_in_words(records)}."
        )
    elif config.get("train_length") and not record and not config.get("imported_from"):  # there it is the most it takes
        lines.append(f"Trained at a length of {config['train_length']} tokens.")
    if origin := config.get("imported_from"):
        named = repository_of(origin.get("base_model")) or (None if record else base_model)
        origin = {**origin, "base_model": named}
        lines.append(_origin(origin))
    if base_model and not (origin and base_model == origin["base_model"]):
        made = "Finetuned from" if record.get("num_steps", 1) else "Copied, without training, from"
        base, length = record.get("base_corpus"), record.get("base_train_length")
        is_known = length and (base or not origin)  # of a model of another family it is the most that it takes
        text = f" of {corpus_name(base)}" if base else ""
        trained = f", which was trained at {length} tokens{text}" if is_known else ""
        lines.append(f"{made} {_code(base_model)}{trained}.")
    if edits := record.get("base_edits"):
        texts = (escape_markdown(f"{name} from {before!r} to {after!r}") for name, (before, after) in edits.items())
        lines.append(f"Changed by hand before that, in its config.json: {'; '.join(texts)}.")
    fields = (record.get("changes") or {}).get("fields", {})
    if fields:
        changes = (escape_markdown(f"{name} from {before!r} to {after!r}") for name, (before, after) in fields.items())
        lines.append(f"Changed in the process: {'; '.join(changes)}.")
    return " ".join(lines)


def _origin(origin: dict[str, Any]) -> str:
    """Where a model was imported from, and what the import changed."""
    named = f"from {_code(origin['base_model'])} " if origin.get("base_model") else ""
    revision = f"at revision {_code(origin['revision'])} " if origin.get("revision") else ""
    changes = (f"{name} from {before!r} to {after!r}" for name, (before, after) in origin["changes"].items())
    changed = escape_markdown("; ".join(changes)) or "nothing but the names of its weights"
    return f"Converted {named}{revision}(`model_type` {_code(origin['model_type'])}), which changed {changed}."


# --- the training


def _training_list(records: Sequence[dict[str, Any]]) -> str:
    """The list of a model's training; of several seeds, with means of what was measured."""
    record = records[0]
    recipe, corpus, shape = record["recipe"], record["corpus"], record.get("shape")
    keys = ("train_loss", "validation_loss", "seconds", "tokens_per_second", "peak_memory_mib")
    measured = {
        key: mean(each[key] for each in records) for key in keys if all(each.get(key) is not None for each in records)
    }
    code = _code(corpus["fingerprint"] or "none: streamed")
    rows = {
        "training length": f"{record.get('block_size', record['train_length'])} tokens",
        "tokens": f"{record['num_tokens']:,} in {record['num_steps']:,} steps of {record['tokens_per_step']:,}",
        "corpus": f"{corpus_name(corpus)}, split train (fingerprint {code})",
        "seed": f"{seeds_in_words(records).partition(' ')[2]}; of the data's order {record['data_seed']}",
        "shape": ", ".join(f"{key} {value}" for key, value in shape.items()) if shape else None,
        "recipe": ", ".join(f"{key} {value}" for key, value in recipe.items()),
        "training loss (mean)": f"{measured['train_loss']:.4f}" if measured.get("train_loss") else None,
        "loss on the split validation": f"{measured['validation_loss']:.4f}"
        if measured.get("validation_loss")
        else None,
        "options of the scheme": str(record["pos_embedding_kwargs"]) if record.get("pos_embedding_kwargs") else None,
        "rotation": str(record["rope_parameters"]) if record.get("rope_parameters") else None,
        "position-start augmentation": "yes" if record.get("position_start_augmentation") else None,
        "position sampling": record.get("position_sampling"),
        "learned factors from 0": ", ".join(record["position_gates"]) if record.get("position_gates") else None,
        "layers": ", ".join(record["layer_types"]) if record.get("layer_types") else None,
        "sliding window": record.get("sliding_window"),
        "time": f"{measured['seconds']:.0f} s, {measured['tokens_per_second']:.0f} tokens per second",
        "peak memory": f"{measured['peak_memory_mib']:.0f} MiB",
    }
    texts = {key: value if key == "corpus" else escape_markdown(value) for key, value in rows.items() if value}
    return "\n".join(f"- **{key}**: {text}" for key, text in texts.items())


def _code(text: Any) -> str:
    """→ Markdown of text in code, whatever it holds."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _fence(text: str) -> str:
    """→ the line around a block of code that no line of it ends."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _setting(records: Sequence[dict[str, Any]]) -> str:
    record = records[0]
    machine, used = record.get("hardware"), record.get("versions", {})
    words = [f"{name} {used[name]}" for name in ("python", "hf_relpos", "torch", "transformers") if name in used]
    if machine:
        device = (
            f"{machine['num_gpus']} × {machine['gpu']}"
            if "gpu" in machine
            else f"{machine['cores']} cores of {machine['cpu']}"
        )
        words.insert(0, device)
    means = "Losses, time and memory are means over the seeds. " if len(records) > 1 else ""
    return means + (escape_markdown(f"On {', '.join(words)}.") if words else "")


def reproduction(name: str, record: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    """The recorded commands that make a model, those that it was finetuned from, and its results again."""
    if "flags" not in record:
        return []
    commands = _import_command(record)
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


def _import_command(record: dict[str, Any]) -> list[str]:
    """The command that imported what the first run of a model began with, if it was a folder that was imported."""
    origin = (record.get("config") or {}).get("imported_from")
    first, *_ = (*record.get("history", ()), record)
    folder = first["flags"].get("model_name_or_path", "/")
    if not origin or not repository_of(origin.get("base_model")) or "/" in folder:
        return []
    revision = f" --revision {origin['revision']}" if origin.get("revision") else ""
    return [f"hf-relpos import {shlex.quote(origin['base_model'])} output/{shlex.quote(folder)}{revision}"]
