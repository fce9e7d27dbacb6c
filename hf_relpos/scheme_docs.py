"""What the docstring of a scheme says.

It has the scheme's full name, an equation, free paragraphs, and parts that begin with `Parameters: `, `Parameters per
layer: `, `Past the training length: `, `Paper: ` or `Source: `, and `Differs: `. What holds for some values of
`rope_type` alone names them: `Differs (dynamic, longrope): `. "see `Base`" in a source stands for the paper of that
class, whose docstring may say for several schemes what they share.
"""

import inspect
import re
from typing import Any

from .model.scheme_base import POSITION_EMBEDDINGS, PositionEmbedding


PARTS = ("Parameters per layer", "Parameters", "Past the training length", "Paper", "Source", "Differs")


def read_docstring(cls: type[PositionEmbedding]) -> dict[str, Any]:
    """→ `title`, `equation`, `text` (paragraphs), those of `PARTS` that there are, and `special`: (part, values of
    `rope_type`, what is said of them)."""
    paragraphs = inspect.cleandoc(cls.__doc__ or cls.__name__).split("\n\n")
    read: dict[str, Any] = {"title": " ".join(paragraphs[0].split()), "equation": "".join(paragraphs[1:2])}
    read |= {"text": [], "special": []}
    for paragraph in paragraphs[2:]:
        text, *parts = re.split(rf"(?:^|\s)({'|'.join(PARTS)})(?: \(([\w, ]+)\))?: ", " ".join(paragraph.split()))
        read["text"] += [text] if text else []
        for part, values, says in zip(parts[::3], parts[1::3], parts[2::3]):
            if values:
                read["special"].append((part, values.split(", "), says))
            else:
                read[part] = says
    return read


def read_scheme(cls: type[PositionEmbedding]) -> dict[str, Any]:
    """As `read_docstring`, with what its base classes say for several schemes."""
    read = read_docstring(cls)
    for base in cls.__mro__[1:]:
        if base is PositionEmbedding or not issubclass(base, PositionEmbedding):
            break
        shared = read_docstring(base)
        has_section = base in POSITION_EMBEDDINGS.values()
        read["text"] += [] if has_section else shared["text"]
        source = shared.get("Paper", shared.get("Source"))
        if "Paper" not in read and source:
            read["Source"] = re.sub(f"see `{base.__name__}`", source.rstrip("."), read.get("Source", source))
        if "Differs" in shared and not has_section:
            read.setdefault("Differs", shared["Differs"])
    return read


def lacking_in_card(name: str, cls: type[PositionEmbedding]) -> str | None:
    """→ what the card of a model with this scheme will lack, in one line; `None` if it lacks nothing."""
    wanted = "a title, an equation, and `Parameters: `, `Past the training length: ` and `Paper: ` or `Source: `"
    if not (cls.__doc__ or "").strip():
        return f"{name!r} has no docstring: the card of a model will say nothing of it. A card reads {wanted}."
    read, groups = read_scheme(cls), (("Parameters", "Parameters per layer"), (PARTS[2],), ("Paper", "Source"))
    missing = [] if read["equation"] else ["an equation"]
    missing += [f"`{group[0]}: `" for group in groups if not {*group} & read.keys()]
    return f"the docstring of {name!r} lacks {', '.join(missing)}: a card reads {wanted}." if missing else None


def link_papers(text: str) -> str:
    """→ the text with a link for each paper of arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
