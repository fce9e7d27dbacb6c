#!/usr/bin/env python
"""Writes docs/schemes.md with its pictures from the registered schemes.

python scripts/schemes.py

It is made from docstrings, class attributes and models as they start.
"""

import math
import re
from pathlib import Path

import torch

from hf_relpos import RelPosConfig, RelPosForCausalLM
from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import write_text
from hf_relpos.model.attention_mask import check_implementation
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS, PositionEmbedding, Positions
from hf_relpos.model.scheme_registry import PositionEmbeddings, build_position_embeddings
from hf_relpos.results.figure_style import FEW_COLORS, new_figure, save_figure
from hf_relpos.scheme_docs import link_papers, read_scheme


ROOT = Path(__file__).parent.parent
# of the pictures: the training length, the largest distance, and where a bias is cut
TRAIN_LENGTH, LONGEST, LARGEST = 128, 1024, 12.0
IMPLEMENTATIONS = {
    "eager": "`eager`",
    "sdpa": "`sdpa`",
    "flex_attention": "`flex_attention`",
    "flash_attention_2": "`flash_attention_2`",
    "paged|sdpa": "continuous batching",
}
# what `attention_path` says → in words
PATHS = {
    "": "as without a scheme",
    "distance_bias": "from a table of the distances, in linear memory",
    "table": "from a table of the distances, in linear memory",
    "key_bias": "with a number per key, in linear memory",
    "dense_bias": "from a dense (query, key) matrix",
}
INTRODUCTION = f"""# Position schemes

What each `pos_embedding_type` computes, what it costs, which kernels support it, and how it looks. This page is made by
`python scripts/schemes.py` from the docstrings and attributes of the classes and from models as they start.

H heads, D channels of a head, C channels of the model; query i, key j, distance d = i − j. The layers that are counted
and drawn have four heads, a width of 256, a training length of {TRAIN_LENGTH} and 2048 positions in a learned table.

Pictures go by the distance from a query at position {LONGEST}, in models before training. They show the bias of each
head, cut at ±{LARGEST:.0f}, beyond which a softmax is all or nothing; for schemes that transform q and k, the score of
an equal q and k, all channels 1, relative to the score without a scheme; for position vectors, their cosine.
"""


def schemes_page() -> str:
    """The text of docs/schemes.md."""
    columns = ("scheme", "kind", "parameters", "with `sdpa`", "past the training length")
    rows, sections = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"], []
    for name, cls in POSITION_EMBEDDINGS.items():
        model = fresh_model(name)
        path = _path(model, "sdpa") or "refused"
        cells = (f"[`{name}`](#{name})", cls.kind, _parameters(name), path, past_training_length(cls))
        rows.append(f"| {' | '.join(cells)} |")
        sections.append(_section(name, cls, model))
    return "\n".join((INTRODUCTION, *rows, "", "\n".join(sections)))


def past_training_length(cls: type[PositionEmbedding]) -> str:
    """The first sentence of that part of the docstring."""
    return _first_sentence(read_scheme(cls)["Past the training length"])


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?:\s|$)", text)[0]


def write_schemes_page(folder: Path) -> list[Path]:
    """Writes `schemes.md` and `schemes/NAME.png`, a picture for each scheme that has one; → the paths."""
    paths = [folder / "schemes.md"]
    write_text(paths[0], schemes_page())
    for name in POSITION_EMBEDDINGS:
        picture = draw_scheme(name, folder / "schemes" / f"{name}.png")
        paths += [picture] if picture else []
    return paths


def fresh_model(name: str) -> RelPosForCausalLM:
    torch.manual_seed(0)
    return RelPosForCausalLM(_config(name)).eval()


def _config(name: str, num_heads: int = 4) -> RelPosConfig:
    sizes = {"hidden_size": 256, "num_attention_heads": num_heads, "head_dim": 64, "num_hidden_layers": 1}
    return RelPosConfig(pos_embedding_type=name, train_length=TRAIN_LENGTH, **sizes)


# --- the text


def _section(name: str, cls: type[PositionEmbedding], model: RelPosForCausalLM) -> str:
    read = read_scheme(cls)
    shown = curves(name, model)
    picture = f"![{name}](schemes/{name}.png)" if shown else "There is nothing to draw without tokens."
    options = ", ".join(f"`{option}` {value}" for option, value in cls.defaults.items()) or "none"
    says = read.get("Parameters", read.get("Parameters per layer", "none"))
    lines = [f"## {name}", read["title"], f"```text\n{read['equation']}\n```", picture, *read["text"]]
    points = [f"**Parameters**: {_parameters(name)}" + ("." if says.startswith("none") else f" ({says.rstrip('.')}).")]
    points += [f"**Options**: {options}.", f"**Cost**: {_cost(cls)}.", f"**Kernels**: {_kernels(model)}."]
    points += [f"**Past the training length**: {read['Past the training length']}"]
    points += [f"**Paper**: {read.get('Paper', read.get('Source'))}"]
    points += [f"**Differs**: {read['Differs']}"] if "Differs" in read else []
    points += [f"**{part}** ({', '.join(values)}): {says}" for part, values, says in read["special"]]
    return link_papers("\n\n".join(lines) + "\n\n" + "\n".join(f"- {point}" for point in points) + "\n")


def _parameters(name: str) -> str:
    """How many, by counting those of four and of eight heads."""
    shared = POSITION_EMBEDDINGS[name].shared_across_layers

    def count(num_heads: int) -> int:
        scheme = build_position_embeddings(_config(name, num_heads), None if shared else 0)[name]
        return sum(parameter.numel() for parameter in scheme.parameters())

    four, per_head = count(4), (count(8) - count(4)) // 4
    if not four:
        return "none"
    rest = four - 4 * per_head
    numbers = " + ".join([f"{rest:,}"] * bool(rest) + [f"{per_head:,} per head"] * bool(per_head))
    return f"{numbers}, {'for all layers' if shared else 'in each layer'}"


def _cost(cls: type[PositionEmbedding]) -> str:
    hooks, once = cls.hooks, "once per forward" if cls.shared_across_layers else "in each layer"
    costs = {
        "embed": "a vector per token is added before the first layer",
        "rotate": "q or k is multiplied in each layer; the factors are computed once per forward",
        "distance_bias": f"heads × length numbers, computed {once}",
        "dense_bias": f"heads × queries × keys numbers, computed {once}" + " elsewhere" * ("distance_bias" in hooks),
        "key_bias": "a number per head and token, computed in each layer and cached beside the keys",
        "score_bias": "heads × queries × keys numbers, several times, from the scores, in each layer",
    }
    return "; ".join(words for hook, words in costs.items() if hook in hooks) or "nothing"


def _path(model: RelPosForCausalLM, implementation: str) -> str:
    """What computes the scheme under an implementation, in words; empty if it is refused."""
    try:
        check_implementation(model.config, implementation)
    except ValueError:
        return ""
    model.config._attn_implementation = implementation
    path = model.attention_path()
    model.config._attn_implementation = "sdpa"
    first, _, suffix = path.partition(":")
    if first == "distance_bias":  # the rest names a kernel of this machine
        scheme = POSITION_EMBEDDINGS[model.config.pos_embedding_type]
        return PATHS["key_bias" if "key_bias" in scheme.hooks else first]
    return PATHS.get(suffix, suffix)


def _kernels(model: RelPosForCausalLM) -> str:
    groups: dict[str, list[str]] = {}
    for implementation, words in IMPLEMENTATIONS.items():
        groups.setdefault(_path(model, implementation) or "refused", []).append(words)
    return "; ".join(f"{path}: {', '.join(names)}" for path, names in groups.items())


# --- the pictures


def curves(name: str, model: RelPosForCausalLM) -> tuple[str, str, dict[str, torch.Tensor]] | None:
    """What a scheme's picture shows: the axes' labels, and lines by distance or position 0..LONGEST by their names.

    `None` for a scheme that has nothing to show without tokens.
    """
    scheme = {**model.model.position_embeddings, **model.model.layers[0].self_attn.position_embeddings}[name]
    cls, positions = type(scheme), torch.arange(LONGEST + 1)[None]
    hooks = cls.hooks
    with torch.no_grad():
        bias = _bias(scheme, model.config)
        if bias is not None:
            what = "bias, random tokens" if "key_bias" in hooks else "bias"
            what += ", without the scores' part" * ("score_bias" in hooks)
            return "distance", what, {f"head {head + 1}": line for head, line in enumerate(bias)}
        if "rotate" in hooks:
            rotation = scheme.rotation(positions, torch.float32)
            ones = torch.ones(1, model.config.num_attention_heads, LONGEST + 1, model.config.head_dim)
            query, key = (x[0, 0] for x in scheme.rotate(ones, ones, rotation))
            if cls.kind == "absolute":
                return "position", "score of q = k", {"": (query * key).mean(-1)}
            return "distance", "score of q = k", {"": (key @ query[-1]).flip(0) / model.config.head_dim}
        if "embed" in hooks:
            vectors = scheme.embed(torch.zeros(1, LONGEST + 1, model.config.hidden_size), positions)[0]
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
            return "distance", "cosine of two vectors", {"": (vectors @ vectors[-1]).flip(0)}
    return None


def _bias(scheme: PositionEmbedding, config: RelPosConfig) -> torch.Tensor | None:
    """→ (H, LONGEST + 1): the bias of the query at position LONGEST, by distance; `None` if there is none."""
    if "key_bias" in scheme.hooks:
        hidden = torch.randn(1, LONGEST + 1, config.hidden_size)
        says = scheme.key_bias(hidden)[0].flip(-1)
        return says.cumsum(-1) - says
    key = torch.arange(LONGEST + 1)[None]
    distance = (LONGEST - key)[:, None]
    visible = torch.ones(1, 1, 1, LONGEST + 1, dtype=torch.bool)
    positions = Positions(key[:, -1:], key, distance, visible)
    schemes = PositionEmbeddings({config.pos_embedding_type: scheme})
    bias = schemes.dense_bias(positions, schemes.pair_tables(positions, LONGEST + 1))
    return None if bias is None else bias[0, :, 0].flip(-1)


def draw_scheme(name: str, path: Path) -> Path | None:
    """Draws a scheme's picture to `path`; → `path`, or `None` if there is nothing to draw."""
    shown = curves(name, fresh_model(name))
    if shown is None:
        return None
    x_label, y_label, lines = shown
    figure = new_figure(6.4, 2.8)
    axes = figure.subplots()
    for label, line in lines.items():
        axes.plot(range(len(line)), line, label=label, linewidth=1.2)
    low, high = (float(bound) for bound in torch.stack([*lines.values()]).aminmax())
    if low < -LARGEST or high > LARGEST:
        axes.set_ylim(max(low, -LARGEST) - 0.5, min(high, LARGEST) + 0.5)
    ticks = [0, *(4**power for power in range(round(math.log(LONGEST, 4)) + 1))]
    axes.set_xscale("symlog", linthresh=1, base=4)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlim=(0, LONGEST), xlabel=f"{x_label} (tokens)", ylabel=y_label, title=name)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    save_figure(figure, path, FEW_COLORS)
    return path


@command
def main() -> None:
    parse_arguments((), __doc__)
    for path in write_schemes_page(ROOT / "docs"):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
