#!/usr/bin/env python
"""Writes the card of every setting in docs/results, over its seeds and with its picture, to model_cards/.

python scripts/model_cards.py
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_relpos import RelPosConfig
from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import write_text
from hf_relpos.experiments.grid import grid_settings
from hf_relpos.hub.model_card import model_card, reproduction
from hf_relpos.results.groups import Group, group_results
from hf_relpos.results.report_figures import draw_group
from hf_relpos.results.result_file import RESULTS, escape_markdown, read_results
from hf_relpos.results.training_record import command_line


ROOT = Path(__file__).parent.parent
INTRODUCTION = """# Cards of the settings in docs/results

`python scripts/model_cards.py` writes them from the result files, in the form that `scripts/push_to_hub.py` gives the
card of one model. The models themselves are not published: `from_pretrained` takes a folder that the commands under
"Reproduce" make. Those of `books` and `books_absolute` need texts that are not part of this repository;
[docs/results.md](../docs/results.md) describes them.
"""
# folder of docs/results whose files do not say with which flags they were made → the experiment that says it
EXPERIMENTS: dict[str, str] = {}
# what an experiment chooses for each setting by itself
TUNED = ("recipe.learning_rate",)
# the seed in commands that are repeated for each seed
SEED = "$seed"


def settings() -> Iterator[tuple[str, str, Group]]:
    """→ experiment, name of the setting and its runs, for all results in docs/results that have a report."""
    for path in sorted((ROOT / "docs" / "results").glob("*/report.md")):
        for group in group_results(read_results(path.with_name(RESULTS)), TUNED):
            yield path.parent.name, re.sub(r"\W+", "-", group.label).strip("-"), group


def write_card(experiment: str, name: str, group: Group, folder: Path) -> str:
    """Writes the card of a setting and its picture; → its line in the list of all cards."""
    first, *others = group.by_seed.values()
    config = {
        "architectures": ["RelPosForCausalLM"],
        "pos_embedding_type": first["pos_embedding_type"],
        "train_length": first["train_length"],
        "max_position_embeddings": RelPosConfig().max_position_embeddings,
    }
    record = {**first["training"], "versions": first["versions"], "hardware": first["hardware"]}
    card = model_card(
        config,
        f"{experiment}-{name}",
        record,
        [first],
        [f"{name}.png"],
        repo_id=f"output/{experiment}-{name}-{first['seed']}",
        commands=commands(experiment, name, group),
        other_seeds=others,
    )
    write_text(folder / experiment / f"{name}.md", f"{str(card).rstrip()}\n")
    (folder / experiment / f"{name}.png").write_bytes(draw_group(group)[1])
    seeds = f"{len(group.by_seed)} seed{'s' * (len(group.by_seed) > 1)}"
    return f"- [{escape_markdown(group.label)}]({experiment}/{name}.md), {seeds}"


def commands(experiment: str, name: str, group: Group) -> list[str]:
    """The commands that make the runs of a setting again: a loop over the seeds."""
    name = f"{experiment}-{name}-{SEED}"
    training = group.first["training"]
    if "flags" in training:
        record = {**training, "flags": {**training["flags"], "seed": SEED}}
        lines = reproduction(name, record, [group.first])
    else:
        lines = experiment_commands(EXPERIMENTS[experiment], name, group.first)
    # the shell is to fill in the seed
    text = re.sub(r"'([\w./-]*\$seed)((?:/[\w.-]+)?)'", r"\1\2", "\n".join(lines))
    return [f"for seed in {' '.join(map(str, group.by_seed))}; do", *(f"  {x}" for x in text.split("\n")), "done"]


def experiment_commands(file_name: str, name: str, result: dict[str, Any]) -> list[str]:
    """The commands of a run of an experiment, found by its scheme and seed."""
    content = yaml.safe_load((ROOT / "experiments" / file_name).read_text(encoding="utf-8"))
    key = ("pos_embedding_type", "seed")
    (flags,) = [flags for flags in grid_settings(content) if all(flags[each] == result[each] for each in key)]
    place = {"model_name_or_path": f"output/{name}", "output_dir": f"output/{name}/evaluation"}
    task = {"task": flags["task"]} if "task" in flags else {}
    return [
        command_line("train", {**flags, "seed": SEED, "output_dir": f"output/{name}"}),
        command_line("evaluate", {**place, **task, **content["evaluate"]}),
    ]


def write_list(lines: Sequence[tuple[str, str]], folder: Path) -> None:
    """Writes README.md, which lists all cards by experiment."""
    parts = [INTRODUCTION]
    for experiment in dict.fromkeys(experiment for experiment, _ in lines):
        parts += [f"## {experiment}\n", "\n".join(line for each, line in lines if each == experiment) + "\n"]
    write_text(folder / "README.md", "\n".join(parts))


@dataclass
class CardArguments:
    """Where the cards go."""

    output_dir: str = field(default=str(ROOT / "model_cards"), metadata={"help": "Folder of the cards."})


@command
def main() -> None:
    (args,) = parse_arguments((CardArguments,), __doc__)
    folder = Path(args.output_dir)
    lines = [(experiment, write_card(experiment, name, group, folder)) for experiment, name, group in settings()]
    write_list(lines, folder)


if __name__ == "__main__":
    main()
