"""What an answer does not hold for: the documents that it was read from, and how short the trainings were."""

from collections.abc import Callable, Sequence
from typing import Any

from .groups import Group
from .result_file import has_held_out_ends
from .training_record import two_digits


FALLING = 0.01  # nats in the last tenth of the steps, from which the loss is said to be falling: 1 % of the perplexity


def caveats(groups: Sequence[Group]) -> list[str]:
    """A sentence each, for the end of the answer."""
    return [line for line in (held_out_ends_text(groups), data_order_text(groups), training_text(groups)) if line]


def held_out_ends_text(groups: Sequence[Group]) -> str:
    """That the text is the ends of documents that were trained on, where it is; else nothing."""
    if not has_held_out_ends(groups[0].first):
        return ""
    number = groups[0].num_documents
    documents = f"{number} documents are" if number > 1 else "document is"
    return (
        f"The {documents} cut: the test is the end of texts whose beginnings were trained on; the interval does not "
        "hold for new documents."
    )


def data_order_text(groups: Sequence[Group]) -> str:
    """That all seeds of a setting read the data in one order, where they did; else nothing."""
    orders = [[(result["training"] or {}).get("data_seed") for result in group.by_seed.values()] for group in groups]
    fixed = {order[0] for order in orders if len(order) > 1 and None not in order and len(set(order)) == 1}
    if not fixed:
        return ""
    return (
        f"The seeds of a setting read the data in one order (`data_seed` {', '.join(map(str, sorted(fixed)))}): the "
        "intervals hold for other initial weights, not for other orders."
    )


def training_text(groups: Sequence[Group]) -> str:
    """How large the models are, how long they were trained, and whether the loss was still falling; empty where records
    do not tell."""
    records = [result["training"] for group in groups for result in group.by_seed.values()]
    if not all(record and record.get("num_parameters") and record.get("num_tokens") for record in records):
        return ""
    parameters = _range([record["num_parameters"] / 1e6 for record in records], "{:.1f}M".format)
    tokens = _range([record["num_tokens"] for record in records], "{:,}".format)
    text = f"Each model has {parameters} parameters and was trained on {tokens} tokens"
    if all(record.get("passes") for record in records):
        text += f", {_range([record['passes'] for record in records], two_digits)} passes over the text"
    longer = "the order may differ with longer training"
    falls = [fall for record in records if (fall := last_fall(record)) is not None]
    if len(falls) < len(records):
        return f"{text}; {longer}."
    mean = sum(falls) / len(falls)
    how = f"in the last tenth of the steps it is {abs(mean):.3f} nats {'below' if mean > 0 else 'above'}"
    how += " that in the tenth before"
    if mean < FALLING:
        if all(record["num_tokens"] >= record["num_parameters"] for record in records):
            return f"{text}. The training loss was hardly falling any more at the end: {how}."
        flat = "though the loss was hardly falling any more where the learning rate ended"
        return f"{text}, fewer than parameters: {longer}, {flat}: {how}."
    return f"{text}. The training loss was still falling at the end: {how}; {longer}."


def last_fall(record: dict[str, Any]) -> float | None:
    """By how many nats the mean of the logged training losses falls from the ninth to the last tenth of the steps;
    `None` where there is none in one of the two."""
    losses = [(entry["step"], entry["loss"]) for entry in record.get("log") or () if "loss" in entry]
    last = max((step for step, _ in losses), default=0)
    tenths = [[loss for step, loss in losses if start < step / last <= start + 0.1] for start in (0.8, 0.9)]
    if not all(tenths):
        return None
    before, after = (sum(tenth) / len(tenth) for tenth in tenths)
    return before - after


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """ "1.3M", or "1.3M to 1.4M" """
    low, high = show(min(values)), show(max(values))
    return high if low == high else f"{low} to {high}"
