"""docs/schemes.md and its pictures, made from the registry: docstrings, class attributes, and fresh models.

A scheme's docstring has its full name, an equation, free paragraphs, and parts that begin with `Parameters: `,
`Parameters per layer: `, `Past the training length: `, `Paper: ` or `Source: `, and `Differs: `. "see `Base`" in a
source stands for the paper of that class, whose docstring may say for several schemes what they share.
"""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import torch

from .environment import write_text
from .model.attention_mask import check_implementation
from .model.configuration_relpos import RelPosConfig
from .model.modeling_relpos import RelPosForCausalLM
from .model.scheme_base import POSITION_EMBEDDINGS, PositionEmbedding, Positions
from .model.scheme_registry import PositionEmbeddings, build_position_embeddings, position_embedding_classes


TRAIN_LENGTH, LONGEST, LARGEST = 128, 1024, 12.0
PARTS = ("Parameters per layer", "Parameters", "Past the training length", "Paper", "Source", "Differs")
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
    "dense_bias": "with a matrix of pairs",
}
INTRODUCTION = f"""# Position schemes

What each `pos_embedding_type` computes, what it costs, which kernels serve it, and how it looks. This page is made by
`python scripts/schemes.py` from the docstrings and attributes of the classes and from models as they start.

H heads, D channels of a head, C channels of the model; query i, key j, distance d = i − j. The layers that are counted
and drawn have four heads, a width of 256, a training length of {TRAIN_LENGTH} and 2048 positions in a learned table.

Pictures go by the distance from a query at position {LONGEST}, in models before training. They show the bias of each
head, cut at ±{LARGEST:.0f}, where it is all or nothing after the softmax; of schemes that transform q and k, the score
of an equal q and k, all channels 1, in parts of the score without a scheme; of position vectors, their cosine.
"""


def schemes_page() -> str:
    """The text of docs/schemes.md."""
    columns = ("scheme", "kind", "parameters", "with `sdpa`", "past the training length")
    rows, sections = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"], []
    for name, cls in POSITION_EMBEDDINGS.items():
        model = fresh_model(name)
        path = _path(model, "sdpa") or "refused"
        rows.append(f"| [`{name}`](#{name}) | {cls.kind} | {_parameters(name)} | {path} | {_beyond(cls)} |")
        sections.append(_section(name, cls, model))
    return "\n".join((INTRODUCTION, *rows, "", "\n".join(sections)))


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


def read_docstring(cls: type[PositionEmbedding]) -> dict[str, Any]:
    """→ `title`, `equation`, `text` (paragraphs) and those of `PARTS` that there are."""
    paragraphs = inspect.cleandoc(cls.__doc__ or cls.__name__).split("\n\n")
    read: dict[str, Any] = {"title": " ".join(paragraphs[0].split()), "equation": "".join(paragraphs[1:2]), "text": []}
    for paragraph in paragraphs[2:]:
        text, *parts = re.split(rf"(?:^|\s)({'|'.join(PARTS)}): ", " ".join(paragraph.split()))
        read["text"] += [text] if text else []
        read |= dict(zip(parts[::2], parts[1::2]))
    return read


def read_scheme(cls: type[PositionEmbedding]) -> dict[str, Any]:
    """As `read_docstring`, with what the classes behind it say for several schemes."""
    read = read_docstring(cls)
    for base in cls.__mro__[1:]:
        if base is PositionEmbedding or not issubclass(base, PositionEmbedding):
            break
        shared = read_docstring(base)
        own = base in POSITION_EMBEDDINGS.values()  # it has a section of its own
        read["text"] += [] if own else shared["text"]
        source = shared.get("Paper", shared.get("Source"))
        if "Paper" not in read and source:
            read["Source"] = re.sub(f"see `{base.__name__}`", source.rstrip("."), read.get("Source", source))
        if "Differs" in shared and not own:
            read.setdefault("Differs", shared["Differs"])
    return read


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
    return link_papers("\n\n".join(lines) + "\n\n" + "\n".join(f"- {point}" for point in points) + "\n")


def _beyond(cls: type[PositionEmbedding]) -> str:
    """Past the training length, in few words."""
    return re.split(r"[;:.,]\s", read_scheme(cls).get("Past the training length", ""))[0].rstrip(".")


def link_papers(text: str) -> str:
    """→ the text with a link for each paper of arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


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
    once = "once per forward" if cls.shared_across_layers else "in each layer"
    costs = []
    if cls.embed is not PositionEmbedding.embed:
        costs.append("a vector per token is added before the first layer")
    if cls.rotate is not PositionEmbedding.rotate:
        costs.append("q or k is multiplied in each layer; the factors are computed once per forward")
    if "distance_bias" in cls.hooks:
        costs.append(f"heads × length numbers, computed {once}")
    if "dense_bias" in cls.hooks:
        costs.append(f"heads × queries × keys numbers, computed {once}" + " elsewhere" * ("distance_bias" in cls.hooks))
    if "key_bias" in cls.hooks:
        costs.append("a number per head and token, computed in each layer and cached with the keys")
    if "score_bias" in cls.hooks:
        costs.append("heads × queries × keys numbers, several times, from the scores, in each layer")
    return "; ".join(costs) or "nothing"


def _path(model: RelPosForCausalLM, implementation: str) -> str:
    """What serves the scheme under an implementation, in words; empty if it is refused."""
    try:
        check_implementation(model.config, implementation)
    except ValueError:
        return ""
    model.config._attn_implementation = implementation
    path = model.attention_path()
    model.config._attn_implementation = "sdpa"
    own, _, suffix = path.partition(":")
    if own == "distance_bias":  # behind it a kernel of this machine
        return PATHS[
            "key_bias"
            if any(
                "key_bias" in cls.hooks for cls in position_embedding_classes(model.config.pos_embedding_type).values()
            )
            else own
        ]
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
    with torch.no_grad():
        bias = _bias(scheme, model.config)
        if bias is not None:
            what = "bias, random tokens" if ("key_bias" in cls.hooks) else "bias"
            what += ", without the scores' part" * ("score_bias" in cls.hooks)
            return "distance", what, {f"head {head + 1}": line for head, line in enumerate(bias)}
        if cls.rotate is not PositionEmbedding.rotate:
            rotation = scheme.rotation(positions, torch.float32)
            ones = torch.ones(1, 1, LONGEST + 1, model.config.head_dim)
            query, key = (x[0, 0] for x in scheme.rotate(ones, ones, rotation))
            if cls.kind == "absolute":
                return "position", "score of q = k", {"": (query * key).mean(-1)}
            return "distance", "score of q = k", {"": (key @ query[-1]).flip(0) / key.shape[-1]}
        if cls.embed is not PositionEmbedding.embed:
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
    bias = PositionEmbeddings({"": scheme}).dense_bias(positions, LONGEST + 1)
    return None if bias is None else bias[0, :, 0].flip(-1)


def draw_scheme(name: str, path: Path) -> Path | None:
    """Draws a scheme's picture to `path`; → `path`, or `None` if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = curves(name, fresh_model(name))
    if shown is None:
        return None
    x_label, y_label, lines = shown
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
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
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path
