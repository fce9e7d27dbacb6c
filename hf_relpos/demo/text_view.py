"""The view of the texts: each model continues the prompt, side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..inference.generate import sample
from ..inference.request_checks import check_number
from .drawing import MAX_TOKENS, PageModel, check_text, counted, render


# the controls' limits, which a request that does not come from the page need not keep
MAX_NEW_TOKENS, MAX_TEMPERATURE, MAX_SEED = 1024, 2, 2**32 - 1
CARDS = """<div class="cards">{% for entry, prompt, text, note, error in rows %}
<section class="card" style="--model: {{ entry.color }}">{{ head(entry) }}
<div class="text"><i>{{ prompt }}</i>{{ text }}</div>
{% if error %}<div class="note">{{ error }}</div>{% else %}<div class="quiet">{{ note }}</div>{% endif %}
</section>{% endfor %}</div>"""


def generate_cards(
    entries: Sequence[PageModel], prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """→ the page's columns after each round of one token per model; an error of a model is shown in its column."""
    try:
        check_text("prompt", prompt)
        for name, value, least, most in (
            ("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS),
            ("temperature", temperature, 0, MAX_TEMPERATURE),
            ("top_p", top_p, 0.01, 1),
            ("seed", seed, 0, MAX_SEED),
        ):
            check_number(name, value, least, most)
        options = int(max_new_tokens), _temperature(temperature), float(top_p), int(seed)
    except ValueError as error:
        yield render(CARDS, rows=[[entry, "", "", "", str(error)] for entry in entries])
        return
    streams = {index: _sample(entry, prompt, *options) for index, entry in enumerate(entries)}
    counts, rows = [0] * len(entries), [[entry, prompt, "", "…", ""] for entry in entries]
    while streams:
        for index in list(streams):
            row = rows[index]
            try:
                tokens, row[2] = next(streams[index])
                counts[index], row[3] = len(tokens), counted(len(tokens))
            except StopIteration:
                del streams[index]
                if counts[index] < options[0]:
                    row[3] = f"{counted(counts[index])}, then the end of the document"
            except ValueError as error:
                del streams[index]
                row[4] = str(error)
        yield render(CARDS, rows=rows)


def _sample(entry: PageModel, prompt: str, *options: Any) -> Iterator[tuple[list[int], str]]:
    count = len(entry.tokenizer(prompt, verbose=False)["input_ids"])
    if count > MAX_TOKENS:
        raise ValueError(f"The prompt has {count} tokens: this page reads at most {MAX_TOKENS}.")
    yield from sample(entry.model, entry.tokenizer, prompt, *options)


def _temperature(value: float) -> float:
    """A temperature that divides logits by next to nothing takes the likeliest token, as 0 does."""
    return 0.0 if value < 0.01 else float(value)
