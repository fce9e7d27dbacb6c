"""A model remembers its corpus: what is recorded, where it is used, and what is said when it is gone or another."""

import json
import os
import shutil

import pytest
from conftest import make_text, save_with_tokenizer
from datasets import Dataset
from helpers import finetuning_flags, refusal, training_flags
from matplotlib.figure import Figure

from hf_relpos.data import corpus as corpora
from hf_relpos.hub.push import _identity
from hf_relpos.hub.repository import repository_files
from hf_relpos.model_corpus import LOCAL_RECORD, TEXT_FLAGS, ModelCorpus, UsedCorpus, opening
from hf_relpos.results.training_record import given_flags
from hf_relpos.tasks.arguments import DataArguments
from hf_relpos.training.model_arguments import ModelArguments


LENGTHS = ["--eval_lengths", 16, 32]
NAME_IT = "name the data with --train_file, --validation_file, --test_file, --dataset_name or --task"


def texts(count, num_words=300, seed=0):
    return [make_text(num_words, seed + index) for index in range(count)]


@pytest.fixture
def project(tmp_path):
    """→ a folder with text of every kind."""
    folder = tmp_path / "project"
    (folder / "folder").mkdir(parents=True)
    (folder / "mine.txt").write_text("<|endoftext|>".join(texts(12)), encoding="utf-8")
    for name, seed in (("train", 20), ("valid", 50)):
        lines = (json.dumps({"body": text}) for text in texts(8, seed=seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / "folder" / f"{name}.txt").write_text(make_text(2000, seed), encoding="utf-8")
    (folder / "other.txt").write_text(make_text(900, 80), encoding="utf-8")
    return folder


@pytest.fixture
def built_in(monkeypatch):
    """A small corpus in place of the built-in one."""

    def load():
        splits = {name: Dataset.from_dict({"text": texts(4, 900)}) for name in ("train", "validation", "test")}
        fingerprint, each = corpora._hash_documents(splits)
        return corpora.Corpus("sotu", splits, fingerprint, corpora.ReadRecord(), each)

    monkeypatch.setattr(corpora, "load_sotu", load)


@pytest.fixture
def train(run_script, tmp_path):
    """→ a function that trains a model on data that flags name; → its folder."""

    def train(*data_flags, name="model", **fields):
        run_script("train", *training_flags(data_flags, tmp_path / name, **fields))
        return tmp_path / name

    return train


@pytest.fixture
def evaluate(run_script, tmp_path):
    """→ a function that evaluates a model with flags; → what the result says of its text."""

    def evaluate(model, *flags):
        folder = tmp_path / f"evaluation-{len(list(tmp_path.glob('evaluation-*')))}"
        run_script(
            "evaluate",
            "--model_name_or_path",
            model,
            "--output_dir",
            folder,
            *([] if "--eval_lengths" in flags else LENGTHS),
            *flags,
        )
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["corpus"]

    return evaluate


def record_of(folder):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


KINDS = {
    "columns": (
        ["--train_file", "train.jsonl", "--validation_file", "valid.jsonl", "--text_column", "body"],
        "train.jsonl+valid.jsonl",
        "validation",
    ),
    "folder": (["--train_file", "folder", "--validation_split_percentage", "50"], "folder", "validation"),
    "separator": (
        ["--train_file", "mine.txt", "--validation_file", "other.txt", "--document_separator", "people"],
        "mine.txt+other.txt",
        "validation",
    ),  # fmt: skip
    "stream": (
        ["--train_file", "mine.txt", "--validation_file", "other.txt", "--streaming", "true"],
        "mine.txt+other.txt",
        "validation",
    ),
    "task": (["--task", "string_copy"], "task string_copy", "test"),
}


@pytest.mark.parametrize("flags, name, split", KINDS.values(), ids=KINDS)
def test_a_newcomer_names_the_text_once(flags, name, split, project, train, evaluate, run_script, capsys, monkeypatch):
    """Train, evaluate, finetune, evaluate, report: all are on that text and say so."""
    monkeypatch.chdir(project)
    sizes = {"vocab_size": None, "max_eval_samples": 8} if "--task" in flags else {}
    model = train(*flags, **sizes)
    printed = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert f"6 steps on {name}, split train; loss " in printed and printed.endswith(f" on {name}, split validation")
    recorded = record_of(model)["corpus"]
    assert recorded["name"] == name and len(recorded["fingerprint"]) == 64
    given = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2]))
    assert {flag: str(recorded["flags"][flag]).replace("True", "true") for flag in given} == given
    monkeypatch.chdir(project.parent)  # whatever the folder it is called from
    tuned = project.parent / "tuned"
    run_script("finetune", *finetuning_flags([], model, tuned, block_size=64, **sizes))
    assert record_of(tuned)["corpus"] == record_of(tuned)["base_corpus"] == recorded
    for each in (model, tuned, model / "checkpoint-3"):
        capsys.readouterr()
        found = evaluate(each)
        assert (found["name"], found["split"], found["fingerprint"]) == (name, split, recorded["fingerprint"])
        assert found["same_corpus_as_training"] is True and found["trained_on"] == name
        printed = capsys.readouterr().out
        assert f"Text: {name}, split {split}.\n" in printed and "another text" not in printed
        assert printed.rstrip().endswith(f"results.json: {name}, split {split}")
    results = [project.parent / f"evaluation-{index}" / "results.json" for index in (0, 1)]
    run_script("report", "--results", *results, "--varied", "tokens_per_step", "--output_dir", project / "report")
    assert capsys.readouterr().out.endswith(f"\nText: {name}, split {split}.\n")


def test_no_path_of_this_machine_leaves_it(project, train, tmp_path, evaluate, run_script, capsys):
    """The record holds names and hashes, and the file with the places is not published; whoever gets the model hears
    which corpus it was."""
    model = train("--train_file", project / "mine.txt")
    evaluate(model)
    places = json.loads((model / LOCAL_RECORD).read_text(encoding="utf-8"))["places"]
    assert places == {"train_file": [str(project / "mine.txt"), os.path.relpath(project / "mine.txt", model)]}
    for file in (model / "training.json", tmp_path / "evaluation-0" / "results.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")
    files = repository_files(model, "me/model")
    assert LOCAL_RECORD not in files and LOCAL_RECORD.startswith("_")  # what transformers' own Trainer leaves out
    published = tmp_path / "published"
    published.mkdir()
    for name, content in files.items():
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    flags = ["--model_name_or_path", published, "--output_dir", tmp_path / "x", *LENGTHS]
    line = refusal(run_script, capsys, "evaluate", flags)
    assert "was trained on 'mine.txt' (train_file 'mine.txt')" in line and NAME_IT in line
    found = evaluate(published, "--train_file", project / "mine.txt")
    assert found["same_corpus_as_training"] is True


def rewrite(folder):
    """Other content of the same size and time."""
    path = folder / "train.txt"
    before = path.stat()
    path.write_text(path.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "gone": (shutil.rmtree, "the corpus 'folder' of {model!r} is gone: `train_file` {folder!r} does not exist"),
    "another text": (rewrite, "has changed since the training: `train_file` {folder}/train.txt' has sha256 "),
    "a file more": (
        lambda folder: (folder / "new.txt").write_text("new"),
        "`train_file` holds a new file, {folder}/new",
    ),
    "a file less": (
        lambda folder: (folder / "train.txt").unlink(),
        "`train_file` lacks {folder}/train.txt' (expected ",
    ),
}


@pytest.mark.parametrize("script", ["evaluate", "finetune", "train"])
@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_corpus_that_is_gone_or_changed_stops_it(
    change, message, script, project, trained_on_folder, run_script, capsys, tmp_path
):
    model, folder = trained_on_folder
    change(folder)
    flags = ["--model_name_or_path", model, "--output_dir", tmp_path / "x", *LENGTHS]
    if script != "evaluate":
        flags = finetuning_flags([], model, tmp_path / "x")
    line = refusal(run_script, capsys, script, flags)
    quoted = repr(str(folder)) if "gone" in message else repr(str(folder))[:-1]
    assert message.replace("{folder!r}", quoted).format(model=str(model), folder=quoted) in line and NAME_IT in line
    assert not (tmp_path / "x").exists()
    run_script(script, *flags, "--train_file", project / "mine.txt")  # it goes on with what is named


@pytest.fixture
def trained_on_folder(project, train):
    flags = ["--train_file", project / "folder", "--validation_split_percentage", 50]
    return train(*flags), project / "folder"


def test_text_and_model_may_move_together(project, run_script, evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    run_script("train", *training_flags(["--train_file", "mine.txt"], "runs/model"))
    project.rename(tmp_path / "moved")
    assert evaluate(tmp_path / "moved" / "runs" / "model")["same_corpus_as_training"]
    # of two texts that are found, the one that is whole is read
    project.mkdir()
    (project / "mine.txt").write_text("another text by now")
    assert evaluate(tmp_path / "moved" / "runs" / "model")["same_corpus_as_training"]


def test_another_corpus_is_named_and_marked(project, train, evaluate, capsys, tmp_path):
    mine, other = project / "mine.txt", project / "other.txt"
    model = train("--train_file", mine, "--validation_file", other, "--cross_document_attention", "true")
    # the same split, whatever is named beside it, and the split that was trained on
    assert evaluate(model, "--validation_file", other)["same_corpus_as_training"] is True
    assert evaluate(model, "--eval_split", "train")["same_corpus_as_training"] is True
    assert evaluate(model, "--streaming", "true")["same_corpus_as_training"] is True
    capsys.readouterr()
    for flags in (["--validation_file", mine], ["--document_separator", "people"]):
        found = evaluate(model, *flags)
        assert found["same_corpus_as_training"] is False and found["trained_on"] == "mine.txt+other.txt"
        printed = capsys.readouterr().out
        assert "| linear_cpb (42), on another text |" in printed
        assert "It is no split of the corpus that linear_cpb (42) trained on, mine.txt+other.txt." in printed


def test_a_flag_that_is_named_wins_also_with_the_value_that_is_the_default(project, train, evaluate):
    """The default stands for what the model was trained with, where the flag is not named."""
    model = train("--train_file", project / "mine.txt", "--validation_split_percentage", 50,
                  "--document_separator", "people")  # fmt: skip
    named = evaluate(model, "--validation_split_percentage", 5, "--document_separator", "<|endoftext|>")
    assert named["read"]["num_documents"] == {"train": 11, "validation": 1}
    assert named["same_corpus_as_training"] is False
    own = evaluate(model)
    assert own["read"]["num_documents"]["validation"] > 20 and own["same_corpus_as_training"] is True


def test_how_attention_goes_over_documents_is_the_models(project, train):
    model = train("--train_file", project / "mine.txt", "--cross_document_attention", "true")
    own = ModelCorpus.read(str(model))
    for given, expected in ((None, True), (True, True), (False, False)):
        for file in (None, str(project / "other.txt")):
            args = own.fill(DataArguments(train_file=file, cross_document_attention=given))
            assert args.cross_document_attention is expected
            assert args.train_file == (file or str(project / "mine.txt"))


def test_finetuning_on_another_text_records_both(project, train, run_script, evaluate, tmp_path):
    model = train("--train_file", project / "mine.txt")
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    run_script("finetune", *finetuning_flags(["--train_file", project / "folder"], model, tuned))
    run_script("finetune", *finetuning_flags([], tuned, again))
    assert record_of(tuned)["corpus"]["name"] == "folder" and record_of(tuned)["base_corpus"]["name"] == "mine.txt"
    assert record_of(again)["corpus"]["name"] == record_of(again)["base_corpus"]["name"] == "folder"
    assert [made["corpus"]["name"] for made in record_of(again)["history"]] == ["mine.txt", "folder"]
    assert evaluate(tuned)["name"] == "folder"
    assert "Finetuned from `model`, which was trained at 32 tokens of mine.txt." in (tuned / "README.md").read_text()


def test_a_model_without_a_record_gets_the_built_in_corpus_and_that_is_said(tmp_path, evaluate, capsys, built_in):
    save_with_tokenizer(tmp_path / "model", "alibi")
    found = evaluate(tmp_path / "model")
    assert (found["name"], found["same_corpus_as_training"], found["trained_on"]) == ("sotu", False, None)
    printed = capsys.readouterr()
    assert "has no record of its corpus: the built-in corpus sotu is used, as another one" in printed.err
    assert "alibi (None), on another text" in printed.out
    assert "What alibi (None) trained on is not recorded." in printed.out


def test_models_of_0_1_0(tmp_path, evaluate, run_script, capsys, built_in):
    """Their record has name and fingerprint: enough for the built-in corpus and tasks; text must be named."""
    folder = tmp_path / "model"
    save_with_tokenizer(folder, "alibi")
    fingerprint = corpora.load_sotu().fingerprint

    def write(name, fingerprint):
        record = {"corpus": {"name": name, "fingerprint": fingerprint}, "flags": {"cross_document_attention": True}}
        record |= {"pos_embedding_type": "alibi", "train_length": 32, "recipe": {}}
        counts = ("seed", "data_seed", "num_steps", "num_tokens", "tokens_per_step", "seconds")
        record |= dict.fromkeys((*counts, "tokens_per_second", "peak_memory_mib"), 42)
        (folder / "training.json").write_text(json.dumps(record))

    write("sotu", fingerprint)
    assert evaluate(folder)["same_corpus_as_training"] is True
    assert ModelCorpus.read(str(folder)).fill(DataArguments()).cross_document_attention
    flags = ["--model_name_or_path", folder, "--output_dir", tmp_path / "x", *LENGTHS]
    write("sotu", "0" * 64)
    line = refusal(run_script, capsys, "evaluate", flags)
    assert "the corpus 'sotu' of" in line and f"its fingerprint is {fingerprint[:12]}, expected 000000000000" in line
    write("mine.txt", fingerprint)
    line = refusal(run_script, capsys, "evaluate", flags)
    assert "was trained on 'mine.txt', and its record does not say where that lies" in line
    found = evaluate(folder, "--task", "passkey_text", "--eval_lengths", 256, "--max_windows", 1)
    assert found["trained_on"] == "mine.txt" and found["same_corpus_as_training"] is False


def test_a_file_called_as_the_built_in_corpus_is_not_taken_for_it(project, train, evaluate, built_in):
    (project / "folder").rename(project / "sotu")
    model = train("--train_file", project / "sotu", "--validation_split_percentage", 50)
    assert evaluate(model)["files"] == record_of(model)["corpus"]["files"]
    assert "State of the Union" not in (model / "README.md").read_text(encoding="utf-8")
    opening = record_of(model)["corpus"]["opening"]
    documents = [path.read_text(encoding="utf-8") for path in (project / "sotu").glob("*.txt")]
    assert 24 < len(opening) <= 48 and sum(text.startswith(opening + " ") for text in documents) == 1
    assert f'tokenizer("{opening}", return_tensors' in (model / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  A short\n\ntext.\n", "A short text."),
        ("word " * 30, ("word " * 9).strip()),
        ("x" * 60 + " and more", None),
        ("\x00 \u202e one \ufeff two", "one two"),
        (" \n", None),
        ("Dear you, /home/alice/notes is mine", "Dear you,"),
        ("alice@example.org wrote", None),
    ],
    ids=["short", "long", "one long word", "signs that are not seen", "white space", "a path", "an address"],
)
def test_the_opening_of_a_corpus_is_that_of_a_document_held_out(text, expected):
    assert opening({"train": [{"text": "not this"}], "validation": [{"text": text}]}) == expected
    assert opening({"train": [{"text": text}]}) == expected and opening({}) is None


def test_a_data_set_in_a_folder_is_found_again(project, train, evaluate, run_script, capsys, tmp_path):
    folder = project / "set"
    folder.mkdir()
    for name in ("train", "validation"):
        shutil.copy(project / "train.jsonl", folder / f"{name}.jsonl")
    model = train("--dataset_name", folder, "--text_column", "body")
    assert record_of(model)["corpus"]["flags"]["dataset_name"] == "set"
    assert evaluate(model)["same_corpus_as_training"] is True
    (folder / "validation.jsonl").write_text(json.dumps({"body": make_text(500, 5)}))
    flags = ["--model_name_or_path", model, "--output_dir", tmp_path / "x", *LENGTHS]
    assert "`dataset_name` " in (line := refusal(run_script, capsys, "evaluate", flags))
    assert "validation.jsonl' has sha256 " in line


def test_a_configuration_of_no_data_set_is_refused(run_script, capsys, tmp_path, trained):
    flags = ["--model_name_or_path", trained / "none", "--output_dir", tmp_path / "x", "--dataset_config_name", "en"]
    assert "`dataset_config_name` needs `dataset_name`, got 'en' alone" in refusal(
        run_script, capsys, "evaluate", flags
    )


@pytest.mark.parametrize(
    "content", ["", "[]", '{"corpus": 1}', '{"corpus": {}, "places": {"train_file": 3}, "files": {}}']
)
def test_a_damaged_note_of_the_places_is_none(content, trained, tmp_path, run_script, capsys):
    shutil.copytree(trained / "none", tmp_path / "model")
    (tmp_path / "model" / LOCAL_RECORD).write_text(content)
    flags = ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "x", *LENGTHS]
    line = refusal(run_script, capsys, "evaluate", flags)
    assert "was trained on 'train+valid.txt' (train_file 'train', validation_file 'valid.txt')" in line


def test_figures_say_what_they_are_about(trained, evaluate, corpus_files, monkeypatch):
    titles = []
    suptitle = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **kw: (titles.append(text), suptitle(self, text, **kw)))
    evaluate(trained / "none")
    evaluate(trained / "none", "--validation_file", corpus_files / "train")
    assert (
        titles == ["train+valid.txt, split validation"] * 2 + ["train, split validation (not what was trained on)"] * 2
    )


def test_a_card_marks_results_on_another_text(project, train, run_script):
    model = train("--train_file", project / "mine.txt")
    for name, flags in (("own", []), ("another", ["--validation_file", project / "other.txt"])):
        run_script("evaluate", "--model_name_or_path", model, "--output_dir", model / name, *LENGTHS, *flags)
    card = repository_files(model, "me/model")["README.md"].decode()
    another, own = card.split("## Loss by length: ")[1:]  # in the order of their folders
    assert own.startswith("the validation split of mine.txt") and "no split" not in own
    assert another.startswith("the validation split of other.txt")
    assert "**This is no split of the corpus that the model was trained on, mine.txt.**" in another
    assert "Loss by position, linear_cpb: other.txt, split validation" in another


def test_a_repository_of_an_earlier_version_is_of_the_same_run():
    """Versions differ in what they record of a corpus beside its name and fingerprint."""
    old = {"name": "a", "fingerprint": "f"}
    assert _identity({**old, "splits": {}, "files": {"train_file": "0"}, "flags": {}}) == _identity(old)
    assert _identity({**old, "fingerprint": "g"}) != _identity(old)


def test_flags_are_recorded_without_the_folders_of_this_machine():
    """Also of files that are gone by then, and of those of a user's home."""
    args = DataArguments(train_file="/gone/mine.txt", validation_file="~/gone/valid.txt")
    assert given_flags(args) == {"train_file": "mine.txt", "validation_file": "valid.txt"}


def test_text_that_is_called_as_a_folder_is_no_place(tmp_path, monkeypatch):
    (tmp_path / "rotary" / "none").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert given_flags(DataArguments(document_separator="/")) == {"document_separator": "/"}
    assert given_flags(ModelArguments(pos_embedding_type="rotary/none")) == {"pos_embedding_type": "rotary/none"}


def test_a_stream_that_cannot_be_told_is_said(capsys):
    flags = {"dataset_name": "some/set", "streaming": True, **dict.fromkeys(TEXT_FLAGS)}
    record = {"name": "set", "fingerprint": "", "splits": {}, "flags": flags, "files": {}, "read": {}}
    own, used = ModelCorpus("model", record), UsedCorpus(record)
    own.check(used, own.fill(DataArguments()))
    assert "the corpus 'set' of 'model' is streamed: nothing tells whether it is as it was" in capsys.readouterr().err
    assert own.is_same(used, "validation")
    assert not own.is_same(UsedCorpus({**record, "flags": {**flags, "dataset_name": "other/set"}}), "validation")


def test_a_configuration_needs_its_data_set():
    own = ModelCorpus("model", {"name": "set", "fingerprint": "f", "flags": {"dataset_name": "some/set"}})
    assert own.fill(DataArguments()).dataset_name == "some/set"
    assert own.fill(DataArguments(dataset_config_name="en")).dataset_name is None  # which is refused then
