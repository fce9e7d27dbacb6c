"""Figures of a report: what their bands and ticks are, and that their captions say so."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_report import SEEDS, make_result, make_score

from hf_relpos.results import report_figures
from hf_relpos.results.figure_style import exact_labels, new_figure, round_ticks
from hf_relpos.results.groups import group_results
from hf_relpos.results.report import write_report
from hf_relpos.results.report_tables import perplexity_rows


@pytest.fixture
def results():
    """Documents differ by far more than seeds: an interval of the seeds alone would be narrow."""
    found = []
    for index, seed in enumerate(SEEDS):
        for scheme, lead in (("none", 0.0), ("alibi", 0.05), ("rotary", 0.02)):
            result = make_result(scheme, seed, 4 - lead * (1 + index / 10))
            spread = np.linspace(-0.4, 0.4, 5)
            losses = {length: (cell["loss"] + spread).tolist() for length, cell in result["lengths"].items()}
            found.append(result | {"documents": {"num_tokens": [100] * 5, "loss": losses}})
    return found


def figures_of(results, monkeypatch, varied=()):
    """→ heading → its matplotlib figure and its caption."""
    drawn = []
    monkeypatch.setattr(report_figures, "figure_png", lambda figure, *_: drawn.append(figure) or b"")
    groups = group_results(results, varied)
    found = report_figures.draw_figures(groups, groups[0].label)
    return {each.heading: (figure, each.caption) for each, figure in zip(found, drawn)}


def finetuned():
    return [
        make_result("alibi", seed, 4 - steps / 1000 - seed / 100, 512, num_steps=steps, base_train_length=128)
        for seed in (1, 2)
        for steps in (25, 50)
    ]


def test_each_figure_says_what_its_bands_are(results, monkeypatch):
    tasks = [make_score(scheme, seed, seed / 20) for scheme in ("none", "alibi") for seed in range(5)]
    others = [result | {"pos_embedding_type": "none"} for result in finetuned()]
    lengths = [make_result("alibi", seed, 4.0, length) for seed in SEEDS for length in (128, 256)]
    found = {}
    for each in (tasks, [*finetuned(), *others], lengths, results):
        found |= figures_of(each, monkeypatch)
    assert {kind.heading for kind in report_figures.KINDS} < {*found}
    for heading, (figure, caption) in found.items():
        drawn = sum(len(axes.collections) for axes in figure.axes)
        assert caption.startswith("Bands: 95 % intervals ") if drawn else "no bands" in caption, heading
        assert " ".join(figure.get_supxlabel().split()) == caption
    assert "of the change itself, for new seeds and new documents" in found["Change of perplexity with the length"][1]
    assert (
        "of the difference, paired by seed, for new seeds on this text; the spread between documents is left out"
        in (found["Loss by position, minus that of none"][1])
    )
    assert found["Bias by distance"][1] == (
        f"A line for each layer and head, of seed {min(SEEDS)} alone, of 5 seeds; no bands. To ±12, as far as one is "
        "within."
    )


def test_biases_are_drawn_as_far_as_they_are_seen(results, monkeypatch):
    """Layers that share a bias are one line for each head; where all have left the frame, nothing would be seen."""
    distances = [*range(9), 100, 200, 512, 1024]
    shared, steep = ([-slope * distance for distance in distances] for slope in (0.01, 0.1))
    for result in results:
        layers = [[shared]] * 2 if result["pos_embedding_type"] == "alibi" else [[steep], [shared]]
        layers = [[[-20.0] * len(distances)]] if result["pos_embedding_type"] == "none" else layers
        result["distance_bias"] = {"distances": distances, "layers": layers}
    figure, _ = figures_of(results, monkeypatch)["Bias by distance"]
    panels = {axes.get_title().partition(",")[0]: axes for axes in figure.axes if axes.get_title()}
    lines = {name: [line for line in axes.get_lines() if len(line.get_xdata()) > 2] for name, axes in panels.items()}
    assert {name: len(each) for name, each in lines.items()} == {"none": 1, "alibi": 1, "rotary": 2}
    assert lines["alibi"][0].get_label() == "all layers"
    assert {name: each[0].get_xdata()[-1] for name, each in lines.items()} == {"none": 8, "alibi": 512, "rotary": 512}


def test_a_setting_of_one_seed_is_named(results, monkeypatch):
    one = [result for result in results if result["seed"] == 42]
    assert all(
        caption == "One seed: no bands." or "seed 42;" in caption
        for _, caption in figures_of(one, monkeypatch).values()
    )
    some = [result for result in results if result["pos_embedding_type"] == "none" or result["seed"] == 42]
    for heading, (figure, caption) in figures_of(some, monkeypatch).items():
        bands = sum(len(axes.collections) for axes in figure.axes)
        assert (
            heading == "Bias by distance"
            or bands == 1
            and caption.endswith("One seed, no band: alibi, rotary.")
            or ("may still be resolved" in caption)
        )


def test_the_band_of_the_perplexity_is_the_interval_of_the_table(results, monkeypatch):
    figure, caption = figures_of(results, monkeypatch)["Perplexity by length"]
    assert "for new seeds and new documents, as in the table" in caption
    rows = perplexity_rows(group_results(results))
    for row, line, band in zip(rows[1:], figure.axes[0].get_lines(), figure.axes[0].collections):
        vertices = band.get_paths()[0].vertices
        for column, length in ((2, 128), (3, 512)):
            mean, low, high = map(float, re.findall(r"[\d.]+", row[column]))
            at = vertices[vertices[:, 0] == length, 1]
            assert (at.min(), at.max()) == pytest.approx((low, high), abs=0.006) and high > 1.2 * mean
            assert line.get_ydata()[line.get_xdata() == length] == pytest.approx(mean, abs=0.006)


def test_the_caption_is_in_the_report(results, tmp_path):
    page, markdown = (path.read_text(encoding="utf-8") for path in write_report(results, tmp_path)[1::-1])
    for text in ("Perplexity by length. Bands: 95 % intervals for new seeds and new documents, as in the table.",):
        assert f'alt="{text}' in page and f"![{text}" in markdown
    assert f"of seed {min(SEEDS)} alone, of 5 seeds" in markdown


@pytest.mark.parametrize("top", [0.02, 0.7, 3, 19.2, 40, 180, 2e5])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_of_ticks_are_their_values(top, scale):
    """Equal steps of 2.5 read +2, +5, +8, +10 once."""
    axes = new_figure(9, 5).subplots()
    axes.set_yscale(scale)
    axes.set_ylim(top / 20 if scale == "log" else -top / 9, top)
    (exact_labels if scale == "log" else round_ticks)(axes.yaxis, "+", " %")
    axes.figure.canvas.draw()
    pairs = [
        (each.get_loc(), each.label1.get_text()) for each in axes.yaxis.get_major_ticks() + axes.yaxis.get_minor_ticks()
    ]
    shown = [(place, label) for place, label in pairs if label]
    assert len(shown) > 2
    for place, label in shown:
        assert (
            float(label.removesuffix(" %").replace("−", "-")) == pytest.approx(place, rel=1e-9, abs=1e-12)
            and "e" not in label
        )
    if scale == "linear":
        step = shown[1][0] - shown[0][0]
        assert f"{step:.6e}".partition("e")[0] in ("1.000000", "2.000000", "5.000000")


def test_no_figure_has_labels_that_round_their_ticks():
    """A format of fixed decimals rounds; counts of tokens, in octaves, are whole."""
    sources = Path(report_figures.__file__).parents[2]
    for path in [
        *sources.rglob("hf_relpos/**/*.py"),
        *sources.rglob("benchmarks/*.py"),
        *sources.rglob("scripts/*.py"),
    ]:
        for call in re.findall(r"yaxis.set_m\w+_formatter\((.*?)\)", path.read_text(encoding="utf-8")):
            assert call == '"{x:g}"', path


def test_finetuned_settings_of_one_scheme_have_lines_of_their_own(monkeypatch):
    """Plain, interpolated and YaRN's rotations were all called "rotary 128 → 512", and the last one drawn."""
    ropes = [None, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}]
    runs = [
        make_result("rotary", seed, 4 - steps / 1000, 512, num_steps=steps, base_train_length=128, rope_parameters=rope)
        for rope in ropes
        for steps in (0, 25, 100)
        for seed in (1, 2)
    ]
    figure, _ = figures_of(runs, monkeypatch)["Loss after finetuning"]
    (axes,) = figure.axes
    names = ["rotary", "rotary rope_type=linear, factor=4.0", "rotary rope_type=yarn, factor=4.0"]
    assert [line.get_label() for line in axes.get_lines()] == [f"{name} 128 → 512" for name in names]
    assert all(line.get_xdata().tolist() == [0, 25, 100] for line in axes.get_lines())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "25", "100"]


def test_finetuned_settings_of_several_learning_rates_have_lines_of_their_own(monkeypatch):
    runs = [
        make_result(
            "alibi", seed, 4 - rate, 512, num_steps=steps, base_train_length=128, recipe={"learning_rate": rate}
        )
        for rate in (0.001, 0.003)
        for steps in (25, 100)
        for seed in (1, 2)
    ]
    figure, _ = figures_of(runs, monkeypatch, ["recipe.learning_rate"])["Loss after finetuning"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].get_lines()}
    assert lines == {f"alibi learning_rate {r} 128 → 512": pytest.approx([3.95 - r] * 2) for r in (0.001, 0.003)}


def test_what_is_not_drawn_is_named(results, monkeypatch):
    """A run of fewer steps than `logging_steps` logs no loss, and two seeds may have logged other steps."""
    for result in results:
        if result["pos_embedding_type"] == "alibi":
            result["training"]["log"] = []
        elif result["pos_embedding_type"] == "rotary":
            result["training"]["log"][0]["step"] = result["training"]["log"][1]["step"] = result["seed"]
    found = figures_of(results, monkeypatch)
    figure, caption = found["Training loss"]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["none"]
    assert caption.endswith(" Not drawn, as no step was logged by all seeds: alibi, rotary.")
    heading = "Loss by position, minus that of none"
    assert "Not drawn" not in found[heading][1]
    apart = [
        result for result in results if (result["seed"] == SEEDS[-1]) == (result["pos_embedding_type"] == "rotary")
    ]
    assert figures_of(apart, monkeypatch)[heading][1].endswith("Not drawn, as no seed is in common with none: rotary.")
    for result in results:
        result["training"]["log"] = []
    assert "Training loss" not in figures_of(results, monkeypatch)


@pytest.mark.filterwarnings("error")
def test_settings_that_are_equal_are_a_flat_line():
    equal = group_results([make_result(scheme, 1, 4.0) for scheme in ("none", "alibi")])
    report_figures.draw_figures(equal, "none")
