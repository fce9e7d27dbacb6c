"""The demo page: its numbers are the models', it says what they cannot do, and it talks to nobody but the browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import ROOT, SCHEMES, make_model, make_text, make_tokenizer, save_with_tokenizer
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, set_seed

from hf_relpos.cli import parse_arguments
from hf_relpos.demo import app as demo
from hf_relpos.demo import attention_view, bias_view, loss_view
from hf_relpos.demo.app import load_models
from hf_relpos.demo.bias_view import bias_page
from hf_relpos.demo.command import DemoArguments
from hf_relpos.demo.drawing import PageModel
from hf_relpos.demo.loss_view import losses_by_position, losses_page
from hf_relpos.demo.text_view import generate_cards
from hf_relpos.inference.generate import sample


PROMPT = "congress and the people"
TEXT = make_text(30, 0)  # between the training length and the end of the learned table
LONG = make_text(150, 0)  # past the learned table


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """→ a model with a bias and one with a learned table of 160 positions, both trained at 24 tokens, as they say."""
    root = tmp_path_factory.mktemp("somebodys_private_folder")
    for scheme in ("linear_cpb", "learned"):
        save_with_tokenizer(root / f"{scheme}-24", scheme, train_length=24)
    return [root / "linear_cpb-24", root / "learned-24"]


@pytest.fixture(scope="module")
def entries(folders):
    return load_models([str(folder) for folder in folders])


def reference_losses(entry, text):
    """One forward for each token, on those before it alone; the softmax in float64."""
    (tokens,) = entry.tokenizer(text, return_tensors="pt")["input_ids"]
    losses = [float("nan")]
    with torch.no_grad():
        for end in range(1, len(tokens)):
            logits = entry.model(tokens[None, :end]).logits[0, -1].double().numpy()
            losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[end]])
    return np.array(losses)


def test_losses_are_those_of_one_forward_per_token(entries):
    page = losses_page(entries, TEXT)
    for entry in entries:
        expected = reference_losses(entry, TEXT)
        assert len(expected) > 40
        # fp32 logits of magnitude 1..10, computed in another order
        assert_allclose(losses_by_position(entry, TEXT), expected, rtol=1e-4, atol=2e-4)
        for part in (expected[1:], expected[1:24], expected[24:]):
            shown = [float(cell) for cell in re.findall(r"<td[^>]*>([\d.e+]+)</td>", page)]
            assert np.isclose(shown, np.exp(part.mean()), rtol=1e-3).any(), (entry.scheme, shown)
        assert f">{len(expected)}</td>" in page
    assert page.count("<svg") == 2 and "trained at 24" in page  # one for wide, one for narrow windows


def test_losses_say_what_cannot_be_read(entries, monkeypatch):
    bias, learned = entries
    with pytest.raises(ValueError, match="has 0 tokens: a loss needs at least 2"):
        losses_by_position(bias, "")
    with pytest.raises(ValueError, match="has 1 token: a loss needs at least 2"):
        losses_by_position(bias, "e")
    assert "<svg" not in losses_page(entries, "e") and losses_page(entries, "e").count("at least 2") == 2
    assert np.isfinite(losses_by_position(bias, LONG)[1:]).all()
    with pytest.raises(ValueError, match=r"has \d{3} tokens, past the 160 positions of the learned table"):
        losses_by_position(learned, LONG)
    page = losses_page(entries, LONG)
    assert "<svg" in page and page.count("past the 160 positions") == 1
    monkeypatch.setattr(loss_view, "MAX_TOKENS", 20)
    with pytest.raises(ValueError, match="this page reads at most 20"):
        losses_by_position(bias, TEXT)


def test_the_size_of_a_text_is_checked_before_it_is_cut_into_tokens(entries):
    def fail(*args, **kwargs):
        raise AssertionError("it was cut")

    entry = PageModel("m", entries[0].model, fail, "#000000")
    for length in (32 * 8192 + 1, 10_000_000):
        page = losses_page([entry], "a" * length)
        assert f"The text has {length} characters: this page reads at most 262144" in page
        (page,) = generate_cards([entry], "a" * length, 5, 0, 1, 42)
        assert f"The prompt has {length} characters" in page and len(page) < 1000


NAN, INFINITY = float("nan"), float("inf")
BAD_TEXTS = {
    "nothing": None,
    "a number": 5,
    "a list": ["a"] * 10**6,
    "a dictionary": {"a": 1},
    "half a pair": "a\ud800",
}
BAD_OPTIONS = {
    0: (0, -1, 1025, 10**9, NAN, INFINITY, "x", None, True),
    1: (-1, NAN, INFINITY, 3, "hot", None),
    2: (0, -1, 2, NAN, "x", None),
    3: (-1, 2**32, 2**70, NAN, 1e300, "x", None),
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_what_is_no_text_is_said(text, entries):
    def fail(*args, **kwargs):
        raise AssertionError("it was cut into tokens")

    entry = PageModel("m", entries[0].model, fail, "#000000")
    for page in (losses_page([entry], text), *generate_cards([entry], text, 5, 0, 1, 42)):
        assert page.count('class="note"') == 1 and "<svg" not in page and len(page) < 1000


@pytest.mark.parametrize("place", BAD_OPTIONS)
def test_numbers_that_no_control_gives_are_said(place, entries):
    """A request need not come from the page: one of 10^9 tokens would hold up all others."""
    for value in BAD_OPTIONS[place]:
        options = [5, 1.0, 0.9, 42]
        options[place] = value
        (page,) = generate_cards(entries[:1], PROMPT, *options)
        name = ("max_new_tokens", "temperature", "top_p", "seed")[place]
        assert f"`{name}` must be a number of" in page and len(page) < 1000, value
    *_, page = generate_cards(entries[:1], PROMPT, 3, 1e-320, 0.01, 2**32 - 1)
    assert ">3 tokens<" in page


def test_biases_of_any_size_are_not_drawn(entries):
    for layer in (-1, NAN, "x", None, [0]):
        assert "`layer` must be a number of" in bias_page(entries[:1], layer, 64, "linear")
    for length in (10**9, 0, 1, -5, NAN, "x", None):
        assert "`length` must be a number of 2 to 8192" in bias_page(entries[:1], 0, length, "linear")
    assert "The axis must be one of" in bias_page(entries[:1], 0, 64, "<b>")
    assert "<svg" in bias_page(entries[:1], 0, 64.0, "linear")


@pytest.mark.parametrize("temperature, top_p", [(0, 1), (1, 1), (0.7, 0.8)], ids=["greedy", "all", "sharper"])
def test_sampling_in_turns_gives_the_tokens_of_generate(entries, temperature, top_p):
    streams = [sample(entry.model, entry.tokenizer, PROMPT, 12, temperature, top_p, seed=5) for entry in entries]
    texts = list(zip(*streams))  # a token of each in turn
    options = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    options = options if temperature else {"do_sample": False}
    for entry, *_, (tokens, text) in zip(entries, *texts):
        inputs = entry.tokenizer(PROMPT, return_tensors="pt")
        set_seed(5)
        output = entry.model.generate(**inputs, max_new_tokens=12, **options)
        assert tokens == output[0, inputs["input_ids"].shape[1] :].tolist() and len(tokens) == 12
        assert text == entry.tokenizer.decode(tokens).rstrip("\ufffd")
        assert torch.is_grad_enabled()


def test_sampling_ends_with_the_document(entries):
    entry = entries[0]
    *_, (tokens, _) = sample(entry.model, entry.tokenizer, PROMPT, 12, 0)
    stop = max(tokens, key=tokens.index)  # the one that comes up last
    entry.model.generation_config.eos_token_id, before = [1, stop], entry.model.generation_config.eos_token_id
    try:
        *_, (shorter, _) = sample(entry.model, entry.tokenizer, PROMPT, 12, 0)
        *_, page = generate_cards([entry], PROMPT, 12, 0, 1, 42)
    finally:
        entry.model.generation_config.eos_token_id = before
    assert shorter == tokens[: tokens.index(stop)] and len(shorter) > 1
    assert f"{len(shorter)} tokens, then the end of the document" in page


def test_cards_say_what_a_model_cannot_do_and_escape(entries):
    *_, page = generate_cards(entries, "the <b>people</b> of " * 5, 120, 0, 1, 42)
    assert "the &lt;b&gt;people&lt;/b&gt; of" in page and "<b>people" not in page
    assert "120 tokens" in page and "`max_new_tokens` must be at most" in page
    *_, page = generate_cards(entries, LONG, 1, 0, 1, 42)
    assert ">1 token<" in page and "`prompt` must have fewer tokens than the learned table has positions, 160" in page


def test_the_page_names_the_corpus_of_each_model(folders, trained):
    """And has examples for those of speeches only."""
    entries = load_models([str(folders[0]), str(trained / "none"), str(trained / "none" / "checkpoint-6")])
    assert [entry.corpus for entry in entries] == [None, "train+valid.txt", "train+valid.txt"]
    page = losses_page(entries, TEXT)
    assert page.count("trained at 32 tokens on train+valid.txt") == 2 and "no split of a corpus" in page
    assert demo.fits_examples(entries[:1]) and not demo.fits_examples(entries)
    gradio = pytest.importorskip("gradio")
    for shown, example in ((entries[:1], "The state of the Union is"), (entries, "")):
        parts = demo.build_page(gradio, shown).config["components"]
        values = {part["props"].get("elem_id"): part["props"].get("value") or "" for part in parts}
        assert values["prompt"] == example and bool(values["text"]) == bool(example)


def test_bias_is_the_formula(tmp_path):
    save_with_tokenizer(tmp_path / "alibi", "alibi", num_attention_heads=4, train_length=None)
    save_with_tokenizer(tmp_path / "rotary", "rotary")
    (alibi, rotary) = load_models([tmp_path / "alibi", tmp_path / "rotary"])
    assert alibi.trained == "training length unknown"
    for scale, shift in (("linear", 0), ("logarithmic", 1)):
        axes = Figure().subplots()
        bias_view.draw_bias(axes, alibi, alibi.model.model.distance_bias(1000)[1].numpy(), scale)
        for slope, line in zip((1 / 4, 1 / 16, 1 / 64, 1 / 256), axes.lines, strict=True):
            distances = line.get_xdata() - shift
            assert distances[0] == 0 and distances[-1] == 999 and 100 < len(distances) <= 400
            assert_allclose(line.get_ydata(), -slope * distances, rtol=1e-6)
    page = bias_page([rotary, alibi], 1, 64, "linear")
    assert page.count("<svg") == 1 and "rotary adds no bias by distance" in page
    assert "No layer 2: this model has layers 0 to 1" in bias_page([alibi], 2, 64, "linear")


def test_bias_ends_where_it_is_no_function_of_the_distance():
    entry = PageModel("fire", make_model("fire", train_length=24), None, "#000000")
    assert "Up to distance 24: past position 24 the bias depends" in bias_page([entry], 0, 64, "linear")
    assert "Up to" not in bias_page([entry], 0, 25, "linear")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_a_page(scheme):
    tokenizer = make_tokenizer()
    entry = PageModel(scheme, make_model(scheme, vocab_size=len(tokenizer)), tokenizer, "#000000")
    page = bias_page([entry], 0, 64, "linear")
    assert ("<svg" in page) == entry.model.config.has_distance_table != ("adds no bias by distance" in page)
    assert "<svg" in losses_page([entry], TEXT)
    weights = attention_view.attention_weights(entry, TEXT, 1, 0)
    assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any()
    *_, page = generate_cards([entry], PROMPT, 3, 0, 1, 42)
    assert ">3 tokens<" in page


def test_names_hold_no_path(folders, entries, tmp_path, monkeypatch):
    assert [entry.name for entry in entries] == ["linear_cpb-24", "learned-24"]
    shutil.copytree(folders[0], tmp_path / "again" / "linear_cpb-24")
    monkeypatch.chdir(folders[1])
    names = [entry.name for entry in load_models([folders[0], str(tmp_path / "again" / "linear_cpb-24"), "."])]
    assert names == ["linear_cpb-24 (1)", "linear_cpb-24 (2)", "learned-24"]
    pages = [*generate_cards(entries, PROMPT, 2, 0, 1, 42), losses_page(entries, LONG), losses_page(entries, "")]
    assert all("private_folder" not in page for page in [*pages, bias_page(entries, 0, 32, "linear")])


def test_refuses_on_one_line(run_script, capsys, folders, tmp_path, monkeypatch):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    for words, message in (
        ([], "the following arguments are required: DIR"),
        ([tmp_path / "llama"], "must be a model of the family ('relpos'), got model_type 'llama'"),
        ([folders[0], tmp_path], "is not a model: it holds no config.json"),
        ([folders[0], "--ports", 1], "unknown flag: '--ports'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_script("demo", *words)
        printed = capsys.readouterr().err
        assert printed.count("error") == 1 and "Traceback" not in printed
        assert re.search("^demo.py: error: .*" + re.escape(message), printed.splitlines()[-1]), printed


def test_names_the_missing_package(run_script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    with pytest.raises(SystemExit, match="2"):
        run_script("demo", "somewhere")
    assert capsys.readouterr().err == (
        'demo.py: error: the page needs the extra `demo` of hf_relpos: pip install -c constraints.txt -e ".[demo]"\n'
    )
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_names_a_taken_port(run_script, capsys, folders):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            run_script("demo", folders[0], "--port", port)
    assert f"`port` {port} of `host` '127.0.0.1' is taken" in capsys.readouterr().err.splitlines()[-1]


def test_words_without_a_flag(tmp_path):
    (tmp_path / "page.yaml").write_text("port: 80\nshare: true\n", encoding="utf-8")
    types, config = (DemoArguments,), ["--config", str(tmp_path / "page.yaml")]
    args, names = parse_arguments(types, "", ["a", "b", *config, "--port", "81"], positional="DIR")
    assert (names, args.port, args.share, args.host) == (["a", "b"], 81, True, "127.0.0.1")
    (tmp_path / "page.yaml").write_text("words: a\n", encoding="utf-8")
    with pytest.raises(ValueError, match="unknown flag: 'words'"):
        parse_arguments(types, "", ["a", *config], positional="DIR")


# --- losses as differences, and attention


def cuts(entry, text):
    """→ (end in bytes, loss) of each token, from the offsets alone."""
    encoded = entry.tokenizer(text, return_offsets_mapping=True)
    losses = losses_by_position(entry, text)
    return [(len(text[:end].encode()), loss) for (_, end), loss in zip(encoded["offset_mapping"], losses)]


def other_tokenizer(model, words):
    """A tokenizer with tokens of its own for some words, and for all bytes: it cuts the text elsewhere."""
    table = {**{token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    table |= {f"Ġ{word}": len(table) + index for index, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(table, continuing_subword_prefix="", unk_token="!", max_input_chars_per_word=99))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    assert len(table) <= model.config.vocab_size
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_the_loss_is_a_difference_to_the_first_model_on_the_same_tokens(entries):
    read = [loss_view.read_losses(entry, TEXT) for entry in entries]
    (zero, found), is_per_token = loss_view.differences(read)
    first, second = (np.array([loss for _, loss in cuts(entry, TEXT)])[1:] for entry in entries)
    assert is_per_token and not zero.values.any() and (found.sizes == 1).all()
    assert_allclose(found.values, second - first, rtol=1e-3, atol=4e-4)
    page = losses_page(entries, TEXT)
    assert "minus linear_cpb (nats per token)" in page and f">{(second - first).mean():+.3f}</td>" in page
    assert "Difference of the loss by position" in page and "cut the text differently" not in page
    places, means, errors = found.means()
    assert len(places) > 2 and (np.diff(places) > 0).all() and (errors > 0).all()
    assert_allclose(means[0], (second - first)[:8].mean(), rtol=1e-3, atol=1e-3)
    assert_allclose(errors[0], (second - first)[:8].std(ddof=1) / 8**0.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "text", [TEXT, "naïve – “people” of congress and €20 äöü " * 3], ids=["ascii", "of many bytes"]
)
def test_tokenizers_that_cut_elsewhere_are_compared_per_byte(entries, text):
    """Between the places where both have an end, losses are summed; in bits per byte of the text."""
    other = PageModel("other", entries[0].model, other_tokenizer(entries[0].model, ["people"]), "#000000")
    pair = [entries[0], other]
    (_, found), is_per_token = loss_view.differences([loss_view.read_losses(entry, text) for entry in pair])
    ends = [dict(), dict()]
    for entry, sums in zip(pair, ends):
        total = 0.0
        for end, loss in cuts(entry, text):
            total += 0.0 if np.isnan(loss) else loss
            sums[end] = total
    start = max(cuts(entry, text)[0][0] for entry in pair)
    common = sorted(end for end in set(ends[0]) & set(ends[1]) if end >= start)
    expected = np.diff([(ends[1][end] - ends[0][end]) / np.log(2) for end in common])
    assert not is_per_token and len(common) > 10
    assert_allclose(found.values, expected, rtol=1e-3, atol=2e-3)
    assert_allclose(found.sizes, np.diff(common))
    page = losses_page(pair, text)
    assert f">{expected.sum() / (common[-1] - common[0]):+.3f}</td>" in page
    assert "minus " in page and "(bits per byte)" in page and "cut the text differently" in page


def test_models_without_a_difference_are_named(entries):
    class Slow:
        is_fast, unk_token_id = False, None
        __call__ = staticmethod(lambda *given, **options: entries[0].tokenizer(*given, **options))

    slow = PageModel("slow", entries[0].model, Slow(), "#000000")
    page = losses_page([*entries, slow], TEXT)
    assert "No difference for slow: its tokenizer does not say where in the text its tokens end." in page
    assert page.count(">–</td>") == 2  # that of the first to itself, and that of the slow one
    words = Tokenizer(models.WordLevel({"!": 0, "people": 1}, unk_token="!"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown = PageModel("words", slow.model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="!"), "#000000")
    page = losses_page([entries[0], unknown], "the people of congress")
    assert "No difference for words: its tokenizer has no token for 3 places of the text." in page
    assert 'aria-label="Loss by position"' in page and "minus" not in page


def reference_attention(entry, text, layer, head):
    """The weights of one head, by the model of transformers' own output."""
    inputs = entry.tokenizer(text, return_tensors="pt")
    entry.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = entry.model(**inputs, output_attentions=True).attentions[layer][0, head].double().numpy()
    entry.model.set_attn_implementation("sdpa")
    return weights


def test_attention_is_the_mean_over_the_queries_at_each_distance(entries, monkeypatch):
    bias, learned = entries
    weights = reference_attention(bias, TEXT, 1, 2)
    count = len(weights)
    found = attention_view.attention_weights(bias, TEXT, 1, 2)
    assert_allclose(found, weights, atol=1e-6)
    expected = [np.mean([weights[i, i - d] for i in range(max(d, 1), count)]) for d in range(count)]
    assert_allclose(attention_view.mean_by_distance(found), expected, atol=1e-6)
    assert bias.model.config._attn_implementation == "sdpa"
    page = attention_view.attention_page(entries, TEXT, 1, 2)
    assert page.count("<svg") == 2 and 'aria-label="Attention by distance, layer 1, head 2"' in page
    assert "mathdefault" not in page and ">0.05</text>" in page  # labels of a logarithmic axis as a reader wants them
    own, first = (100 * np.mean(shares) for shares in (np.diagonal(weights)[1:], weights[1:, 0]))
    assert f">{own:.1f} %</td>" in page and f">{first:.1f} %</td>" in page
    nearest_half = np.cumsum([sum(weights[i, i - d] for i in range(max(d, 1), count)) for d in range(count)])
    assert f">{int((nearest_half < (count - 1) / 2).sum())}</td>" in page
    monkeypatch.setattr(attention_view, "MAX_READ", 20)
    assert attention_view.attention_weights(bias, TEXT, 0, 0).shape == (20, 20)
    assert attention_view.attention_weights(learned, LONG, 0, 0).shape == (20, 20)


def test_attention_says_what_it_cannot_show(entries):
    page = attention_view.attention_page(entries, TEXT, 7, 0)
    assert page.count("No layer 7: this model has layers 0 to 1") == 2 and "<svg" not in page
    assert "No head 6: this model has heads 0 to 5" in attention_view.attention_page(entries, TEXT, 0, 6)
    assert "a distance needs at least 2" in attention_view.attention_page(entries, "", 0, 0)
    for value in (-1, NAN, "x", None, [0]):
        assert "`layer` must be a number of" in attention_view.attention_page(entries, TEXT, value, 0)
        assert "`head` must be a number of" in attention_view.attention_page(entries, TEXT, 0, value)
    for text in BAD_TEXTS.values():
        assert attention_view.attention_page(entries[:1], text, 0, 0).count('class="note"') == 1


# --- in a browser


# tells of every address but the loopback's that the server looks up or connects to
WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0] if event != "socket.connect" else arguments[1]
        host = host[0] if isinstance(host, tuple) else host
        if host not in ("127.0.0.1", "localhost", None):
            print("REACHES OUT:", event, host, flush=True)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture
def server(folders):
    """→ the address of the page, served by the script in a process that may use the network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", WATCHED, str(ROOT / "scripts" / "demo.py"), *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "*", "CUDA_VISIBLE_DEVICES": ""}
    log = folders[0].parent / "log"
    with (
        open(log, "w", encoding="utf-8") as stream,
        subprocess.Popen([*command, "--port", str(port)], stdout=stream, stderr=stream, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while f"http://127.0.0.1:{port}" not in log.read_text(encoding="utf-8"):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    assert "REACHES OUT" not in log.read_text(encoding="utf-8")


@pytest.fixture
def browser():
    """→ a headless Chromium: the one that is installed, or the one that playwright has downloaded."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        path = CHROMIUM or started.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium is installed")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_page_in_a_browser(browser, server, folders, entries):
    requests, errors = [], []
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    context.on("request", lambda request: requests.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server)

    # text: both models go on with the prompt, one token after the other
    prompt = PROMPT + " <i>${1 + 1}</i>"
    page.get_by_label("Prompt").fill(prompt)
    for name, value in (("max_new_tokens", "24"), ("temperature", "0")):
        page.get_by_label(f"number input for {name}").fill(value)
        page.get_by_label(f"number input for {name}").press("Tab")
    page.evaluate(
        "seen = new Set(); new MutationObserver(() => seen.add(document.querySelector('#texts .text').textContent))"
        ".observe(document.querySelector('#texts'), {childList: true, subtree: true, characterData: true})"
    )
    page.locator("#generate").click()
    page.wait_for_function("[...document.querySelectorAll('#texts .quiet')].every(e => e.textContent == '24 tokens')")
    shown = page.locator("#texts .text").all_text_contents()
    for entry, text in zip(entries, shown, strict=True):
        *_, (_, expected) = sample(entry.model, entry.tokenizer, prompt, 24, 0)
        assert text == prompt + expected
    assert shown[0] != shown[1] and page.evaluate("seen.size") > 3
    labels = page.locator("#texts .model").all_inner_texts()
    assert labels == [f"{entry.scheme}\ntrained at 24 tokens · {entry.name}" for entry in entries]

    # loss: both on a short text, one on a text past the learned table
    page.get_by_role("tab", name="Loss").click()
    page.get_by_label("Text to read").fill(TEXT)
    page.locator("#read").click()
    page.wait_for_function("document.querySelectorAll('#losses tbody tr').length == 2")
    means = page.locator("#losses td:nth-child(3)").all_inner_texts()
    assert means == [f"{np.nanmean(losses_by_position(entry, TEXT)):.3f}" for entry in entries]
    assert page.locator("#losses .figure.wide svg").is_visible()
    assert not page.locator("#losses .figure.narrow svg").is_visible()
    page.get_by_label("Text to read").fill(LONG)
    page.locator("#read").click()
    page.wait_for_selector("#losses .note")
    count = len(entries[0].tokenizer(LONG)["input_ids"])
    said = f"The text has {count} tokens, past the 160 positions of the learned table."
    assert page.locator("#losses .note").all_inner_texts() == [said]

    # attention: a line for each model, of the layer and head that are chosen
    page.get_by_role("tab", name="Attention").click()
    page.get_by_label("Text to attend to").fill(TEXT)
    page.get_by_role("combobox", name="Head to look at").click()
    page.get_by_role("option", name="head 3").click()
    page.locator("#look").click()
    plot = page.locator("#attentions .figure.wide svg[aria-label='Attention by distance, layer 0, head 3']")
    plot.wait_for()
    assert all(name in plot.text_content() for name in ("equal weights", "linear_cpb", "learned"))

    # bias: a line per head; another layer has others
    page.get_by_role("tab", name="Bias").click()
    plot = page.locator("#biases svg")
    assert plot.count() == 1 and "learned adds no bias" in page.locator("#biases").inner_text()
    assert [f"head {head}" in plot.text_content() for head in range(7)] == [True] * 6 + [False]
    first = plot.inner_html()
    page.get_by_role("combobox", name="Layer").click()
    page.get_by_role("option", name="layer 1").click()
    page.wait_for_selector("#biases svg[aria-label$='layer 1']")
    assert plot.inner_html() != first

    # drawn in the page's own colour, whichever that is
    color = "e => getComputedStyle(e).color"
    assert plot.locator("text").first.evaluate("e => getComputedStyle(e).fill") == page.locator("body").evaluate(color)
    page.set_viewport_size({"width": 400, "height": 900})
    for name in ("Text", "Loss", "Attention", "Bias"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert not errors
    hosts = {urlsplit(url).hostname for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    config = page.evaluate("fetch('/config').then(answer => answer.text())")
    assert folders[0].parent.name not in page.content() + config and "linear_cpb-24" in config
    context.close()
