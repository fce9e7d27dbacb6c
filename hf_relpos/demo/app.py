"""A page in the browser: saved models side by side, by text, loss by position, attention and bias.

The page has no picture, script or font from elsewhere, and nothing is sent anywhere: it works offline.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..model.modeling_relpos import RelPosForCausalLM
from ..model_corpus import ModelCorpus
from ..model_loading import load_model, load_model_tokenizer
from .attention_view import attention_page
from .bias_view import MAX_DISTANCES, SCALES, bias_page
from .drawing import COLORS, CSS, PageModel, render
from .loss_view import losses_page
from .text_view import CARDS, MAX_NEW_TOKENS, MAX_SEED, MAX_TEMPERATURE, generate_cards


FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
BUILT_IN = "sotu"  # the corpus of speeches
EXAMPLE_INFO = "An example: Lincoln at Gettysburg, 1863."
EXAMPLE = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
    "Liberty, and dedicated to the proposition that all men are created equal.\n\n"
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so "
    "dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate a "
    "portion of that field, as a final resting place for those who here gave their lives that that nation might "
    "live. It is altogether fitting and proper that we should do this.\n\n"
    "But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. "
    "The brave men, living and dead, who struggled here, have consecrated it, far above our poor power to add or "
    "detract. The world will little note, nor long remember what we say here, but it can never forget what they "
    "did here. It is for us the living, rather, to be dedicated here to the unfinished work which they who fought "
    "here have thus far so nobly advanced. It is rather for us to be here dedicated to the great task remaining "
    "before us -- that from these honored dead we take increased devotion to that cause for which they gave the "
    "last full measure of devotion -- that we here highly resolve that these dead shall not have died in vain -- "
    "that this nation, under God, shall have a new birth of freedom -- and that government of the people, by the "
    "people, for the people, shall not perish from the earth."
)


def load_models(names: Sequence[str]) -> list[PageModel]:
    """Loads models of the family.

    Args:
        names: folders, or names on the Hub.

    Raises:
        ValueError: for one that is not a language model of the family, or has no tokenizer.
    """
    # of a folder the last part only: the page must not show paths
    shown = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    entries = []
    for index, name in enumerate(names):
        model = load_model(name, RelPosForCausalLM).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        label = shown[index]
        if shown.count(label) > 1:
            label += f" ({shown[: index + 1].count(label)})"
        color = COLORS[index % len(COLORS)]
        tokenizer, corpus = load_model_tokenizer(name, model), ModelCorpus.read(name).name
        entries.append(PageModel(label, model, tokenizer, color, corpus))
    return entries


def import_gradio() -> Any:
    """The library with its telemetry off; raises `ValueError` if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        needed = 'the page needs the extra `demo` of hf_relpos: pip install -c constraints.txt -e ".[demo]"'
        raise ValueError(needed) from error
    return gradio


def build_page(gradio: Any, entries: Sequence[PageModel]) -> Any:
    """→ the page, a `gradio.Blocks`."""
    with gradio.Blocks(title="hf_relpos", analytics_enabled=False) as page:
        gradio.Markdown("# Position embeddings side by side")
        with gradio.Tab("Text"):
            gradio.Markdown("Each model continues the prompt. Temperature 0 takes the likeliest token each time.")
            _text_tab(gradio, entries)
        with gradio.Tab("Loss"):
            gradio.Markdown("How much better or worse each model predicts a text than the first one, by position.")
            text = _text_box(gradio, entries, "Text to read", "text")
            read = gradio.Button("Compute the loss", variant="primary", elem_id="read")
            losses = gradio.HTML(elem_id="losses", apply_default_css=False)
            _connect(read, lambda given: losses_page(entries, given), text, losses)
        with gradio.Tab("Attention"):
            gradio.Markdown("How much weight one head gives to the keys at each distance, on average over a text.")
            _attention_tab(gradio, entries)
        with gradio.Tab("Bias"):
            gradio.Markdown("What attention adds to the score of a key, by its distance and by head.")
            _bias_tab(gradio, entries)
    return page


def fits_examples(entries: Sequence[PageModel]) -> bool:
    """Whether all models were trained on the built-in corpus, which the page's examples resemble, or do not tell."""
    return all(entry.corpus in (None, BUILT_IN) for entry in entries)


def _connect(button: Any, function: Callable[..., Any], inputs: Any, output: Any, event: str = "click") -> Any:
    # one at a time for the whole page: the models share one machine
    return getattr(button, event)(
        function, inputs, output, concurrency_id="models", concurrency_limit=1, show_progress="minimal"
    )


def _text_box(gradio: Any, entries: Sequence[PageModel], label: str, elem_id: str) -> Any:
    example, info = (EXAMPLE, EXAMPLE_INFO) if fits_examples(entries) else ("", "Any text that you like.")
    return gradio.Textbox(example, label=label, info=info, lines=6, max_lines=12, elem_id=elem_id)


def _text_tab(gradio: Any, entries: Sequence[PageModel]) -> None:
    example = "The state of the Union is" if fits_examples(entries) else ""
    prompt = gradio.Textbox(example, label="Prompt", lines=2, elem_id="prompt")
    with gradio.Row():
        options = [
            gradio.Slider(1, MAX_NEW_TOKENS, 100, step=1, label="max_new_tokens", elem_id="max_new_tokens"),
            gradio.Slider(0, MAX_TEMPERATURE, 0.8, step=0.05, label="temperature"),
            gradio.Slider(0.05, 1, 0.95, step=0.05, label="top_p"),
            gradio.Number(42, precision=0, minimum=0, maximum=MAX_SEED, label="seed"),
        ]
    with gradio.Row():
        start = gradio.Button("Generate", variant="primary", scale=3, elem_id="generate")
        stop = gradio.Button("Stop", scale=1)
    texts = gradio.HTML(
        render(CARDS, rows=[(entry, "", "", "", "") for entry in entries]), elem_id="texts", apply_default_css=False
    )

    def generate(*given: Any) -> Iterator[str]:
        if given[-1] is None:
            raise gradio.Error("The seed must be a whole number.")
        yield from generate_cards(entries, *given)

    inputs = [prompt, *options]
    running = [_connect(start, generate, inputs, texts), _connect(prompt, generate, inputs, texts, "submit")]
    stop.click(None, cancels=running)


def _bias_tab(gradio: Any, entries: Sequence[PageModel]) -> None:
    configs = [entry.model.config for entry in entries]
    curved = [config for config in configs if config.has_distance_table]
    first = 0, min(MAX_DISTANCES, max([256, *(4 * (config.train_length or 0) for config in curved)])), "linear"
    with gradio.Row(visible=bool(curved)):
        layers = range(max((config.num_hidden_layers for config in curved), default=1))
        inputs = [
            gradio.Dropdown([(f"layer {layer}", layer) for layer in layers], value=0, label="Layer", elem_id="layer"),
            gradio.Slider(16, MAX_DISTANCES, first[1], step=16, label="Length (distances)"),
            gradio.Radio([*SCALES], value="linear", label="Axis of distances"),
        ]
    biases = gradio.HTML(bias_page(entries, *first), elem_id="biases", apply_default_css=False)
    for control, event in zip(inputs, ("change", "release", "change")):
        _connect(control, lambda *given: bias_page(entries, *given), inputs, biases, event)


def _attention_tab(gradio: Any, entries: Sequence[PageModel]) -> None:
    configs = [entry.model.config for entry in entries]
    text = _text_box(gradio, entries, "Text to attend to", "attention_text")
    with gradio.Row():
        counts = {"layer": "num_hidden_layers", "head": "num_attention_heads"}
        inputs = [
            gradio.Dropdown(
                [(f"{name} {index}", index) for index in range(max(getattr(config, field) for config in configs))],
                value=0,
                label=f"{name.capitalize()} to look at",
                elem_id=f"attention_{name}",
            )
            for name, field in counts.items()
        ]
    look = gradio.Button("Compute the attention", variant="primary", elem_id="look")
    attentions = gradio.HTML(elem_id="attentions", apply_default_css=False)
    _connect(look, lambda *given: attention_page(entries, *given), [text, *inputs], attentions)
    for control in inputs:  # of a text that was computed before: an empty page stays empty
        _connect(control, lambda *given: attention_page(entries, *given), [text, *inputs], attentions, "input")


def serve_page(names: Sequence[str], host: str, port: int, share: bool) -> None:
    """Loads the models and serves the page until it is interrupted.

    Raises:
        ValueError: without gradio, for what is not a model of the family, or if the port is taken.
    """
    gradio = import_gradio()
    page = build_page(gradio, load_models(names))
    theme = gradio.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS[0], font_mono=FONTS[1])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            max_file_size="1kb",  # the page takes none
        )
    except OSError as error:
        raise ValueError(f"`port` {port} of `host` {host!r} is taken, or not free to use.") from error
