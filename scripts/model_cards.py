#!/usr/bin/env python
"""Writes the card of every run in docs/results, with its picture, to model_cards/.

python scripts/model_cards.py
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_relpos import RelPosConfig
from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import write_text
from hf_relpos.experiments.grid import grid_settings
from hf_relpos.hub.model_card import model_card
from hf_relpos.hub.repository import draw_result
from hf_relpos.results.result_file import read_result
from hf_relpos.results.statistics import group_results
from hf_relpos.training.record import command_line


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
# folder of docs/results whose files do not say by which flags they were made → the experiment that says it
EXPERIMENTS = {"books": "books_on_cpu.yaml", "flip_flop": "flip_flop.yaml"}


def runs() -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]], list[str] | None]]:
    """→ name of the card, result, results of the other seeds, and the commands where the result does not say them."""
    for path in sorted(RESULTS.glob("*.json")):
        if path.name != "conformance.json":
            yield f"sotu/{path.stem}", read_result(path), [], readme_commands(path.stem)
    for listed in sorted(RESULTS.glob("*/results.txt")):
        folder = listed.parent
        results = [read_result(folder / line) for line in listed.read_text(encoding="utf-8").split()]
        for group in group_results(results):
            for seed, result in group.by_seed.items():
                others = [other for number, other in group.by_seed.items() if number != seed]
                name = re.sub(r"\W+", "-", group.label).strip("-")
                commands = experiment_commands(folder.name, f"{name}-{seed}", result)
                yield f"{folder.name}/{name}-{seed}", result, others, commands


def readme_commands(scheme: str) -> list[str]:
    """The commands of the README's comparison, for one scheme."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^for scheme in .*?; do\n(.*?)^done$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("  ") for line in loop.replace("$scheme", scheme).splitlines()]
    return lines


def experiment_commands(folder: str, name: str, result: dict[str, Any]) -> list[str] | None:
    """The commands of one run of an experiment, by its scheme and seed."""
    if "flags" in result["training"]:
        return None
    path = ROOT / "experiments" / EXPERIMENTS[folder]
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    key = ("pos_embedding_type", "seed")
    (settings,) = [
        settings for settings in grid_settings(content) if all(settings[each] == result[each] for each in key)
    ]
    place = {"model_name_or_path": f"output/{name}", "output_dir": f"output/{name}/evaluation"}
    task = {"task": settings["task"]} if "task" in settings else {}
    return [
        command_line("train", {**settings, "output_dir": f"output/{name}"}),
        command_line("evaluate", {**place, **task, **content["evaluate"]}),
    ]


@dataclass
class CardArguments:
    """Where the cards go."""

    output_dir: str = field(default=str(ROOT / "model_cards"), metadata={"help": "Folder of the cards."})


@command
def main() -> None:
    (args,) = parse_arguments((CardArguments,), __doc__)
    for name, result, others, commands in runs():
        path = Path(args.output_dir) / f"{name}.md"
        config = {
            "architectures": ["RelPosForCausalLM"],
            "pos_embedding_type": result["pos_embedding_type"],
            "train_length": result["train_length"],
            "max_position_embeddings": RelPosConfig().max_position_embeddings,
        }
        picture, content = draw_result(result)
        title = name.replace("/", "-")
        record = {**result["training"], "versions": result["versions"], "hardware": result["hardware"]}
        card = model_card(config, title, record, [result], [f"{path.stem}.png"], commands=commands, other_seeds=others)
        write_text(path, str(card))
        path.with_suffix(".png").write_bytes(content)


if __name__ == "__main__":
    main()
