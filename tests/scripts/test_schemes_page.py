"""docs/schemes.md is what the registry says, and takes up schemes it has never seen."""

import pytest
import torch
from conftest import ROOT, load_script

from hf_relpos import PositionEmbedding, list_position_embeddings, register_position_embedding
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


schemes = load_script("schemes")
curves, fresh_model = schemes.curves, schemes.fresh_model


def test_the_page_and_its_pictures_are_those_of_the_registry():
    assert (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8") == schemes.schemes_page(), (
        "run python scripts/schemes.py"
    )
    drawn = {name for name in list_position_embeddings() if curves(name, fresh_model(name))}
    assert {path.stem for path in (ROOT / "docs" / "schemes").iterdir()} == drawn


def test_pictures_show_what_the_schemes_do():
    shown = {name: curves(name, fresh_model(name)) for name in list_position_embeddings()}
    (_, bias, heads) = shown["alibi"]
    assert bias == "bias" and heads["head 2"].tolist() == [-d / 16 for d in range(1025)]
    for name in ("rotary", "xpos", "sinusoidal", "learned"):
        (line,) = shown[name][2].values()
        assert line[0].item() == pytest.approx(1, rel=1e-5) and line[1:].max() < 1
    angles = [10000 ** (-k / 32) * 7 for k in range(32)]
    assert shown["rotary"][2][""][7].item() == pytest.approx(sum(torch.tensor(angles).cos()).item() / 32, abs=1e-4)
    (line,) = shown["temperature"][2].values()
    assert (line[:128] == 1).all() and (line[128:].diff() > 0).all()
    limit = fresh_model("fire").model.distance_bias(129)[0]
    assert not torch.allclose(torch.stack([*shown["fire"][2].values()])[:, :129], limit)  # of a query far past it


def test_a_new_scheme_gets_a_section_and_what_picture_it_can(tmp_path):
    class Recent(PositionEmbedding):
        """A bias for keys near the query.

        b[h, i, j] = 1 if i − j < width 3, else 0

        More words.

        Parameters: none. Past the training length: nothing new. Source: an invention.
        """

        defaults = {"width": 3}
        kind = "relative"

        def dense_bias(self, positions):
            return (positions.distance < 3).float()[:, None].expand(-1, 4, -1, -1)

    class Unseen(Recent):
        __doc__ = Recent.__doc__
        shared_across_layers = False
        dense_bias = PositionEmbedding.dense_bias

        def score_bias(self, scores, bias, query, positions):
            return -scores

    for name, cls in (("test_recent", Recent), ("test_unseen", Unseen)):
        register_position_embedding(name)(cls)
    try:
        page = schemes.schemes_page()
        recent = page.partition("## test_recent")[2].partition("## test_unseen")[0]
        assert "```text\nb[h, i, j] = 1 if i − j < width 3, else 0\n```" in recent and "\n\nMore words.\n\n" in recent
        assert "- **Options**: `width` 3." in recent and "from a dense (query, key) matrix: `eager`, `sdpa`" in recent
        assert "- **Paper**: an invention." in recent and "(schemes/test_recent.png)" in recent
        assert (
            "| [`test_recent`](#test_recent) | relative | none | from a dense (query, key) matrix | nothing new |"
            in page
        )
        assert "There is nothing to draw without tokens." in page.partition("## test_unseen")[2]
        assert schemes.draw_scheme("test_recent", tmp_path / "recent.png").stat().st_size > 1000
        assert schemes.draw_scheme("test_unseen", tmp_path / "unseen.png") is None
    finally:
        del POSITION_EMBEDDINGS["test_recent"], POSITION_EMBEDDINGS["test_unseen"]
