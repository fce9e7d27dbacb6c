"""From training to a repository that loads anywhere, over HTTP, against a double of the Hub; and what goes wrong there.

Clients run in other processes: where the Hub is, is read when huggingface_hub is imported. `Client` is one that lives
through several commands, since starting one takes seconds.
"""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model
from hub_double import READ_ONLY_TOKEN, TOKEN, HubDouble
from saved_model import save_model

from hf_relpos import RelPosForCausalLM
from hf_relpos.hub.model_card import is_generated
from hf_relpos.model.saved_code import code_files
from hf_relpos.model_corpus import LOCAL_RECORD


LOOP = """
import contextlib, io, json, os, runpy, sys, traceback
import hf_relpos.hub.push, hf_relpos.training.train
for line in sys.stdin:
    script, argv, environment = json.loads(line)
    saved = dict(os.environ)
    os.environ.update(environment)
    for name in [name for name, value in environment.items() if value == ""]:
        del os.environ[name]
    sys.argv, code, printed = [script, *argv], 0, io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            if script.endswith(".py"):
                runpy.run_path(script, run_name="__main__")
            else:
                exec(script, {})
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    os.environ.clear()
    os.environ.update(saved)
    print("\\nDONE" + json.dumps([code, printed.getvalue()]), file=sys.__stdout__, flush=True)
"""


class Client:
    """A process in which scripts run one after the other, as if each were started anew."""

    def __init__(self, hub, folder):
        environment = hub.environment(folder) | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", LOOP], env=environment, text=True, cwd=folder, **pipes)

    def run(self, script: str, *argv: object, **environment: str) -> tuple[int, str]:
        """→ exit code and what was printed; of a script by its name, or of code. An empty variable is none."""
        path = ROOT / "scripts" / f"{script}.py"
        words = [str(path) if "\n" not in script and path.is_file() else script, list(map(str, argv)), environment]
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("DONE"):
            assert line, "the process ended"
        return tuple(json.loads(line.removeprefix("DONE")))

    def check(self, script: str, *argv: object, **environment: str) -> str:
        code, printed = self.run(script, *argv, **environment)
        assert code == 0, printed[-3000:]
        return printed

    def refuse(self, script: str, *argv: object, **environment: str) -> str:
        """→ the one line of a refusal."""
        code, printed = self.run(script, *argv, **environment)
        lines = [line for line in printed.splitlines() if "error:" in line]
        assert code == 2 and len(lines) == 1 and "Traceback" not in printed, printed[-3000:]
        assert TOKEN not in printed and "http://" not in printed
        return lines[0]


@pytest.fixture(scope="module")
def hub():
    """One for all tests here, each of which has repositories of its own."""
    hub = HubDouble()
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub, tmp_path_factory.mktemp("client"))
    yield client
    client.process.kill()
    client.process.wait()


NUMBERS = itertools.count()


@pytest.fixture
def name():
    """→ a repository that no other test knows."""
    return f"alice/m{next(NUMBERS)}"


TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=4,hidden_dropout=0"


def training_flags(corpus_files, **flags):
    given = dict(train_file=corpus_files / "train", validation_file=corpus_files / "valid.txt", use_cpu="true")
    given |= dict(block_size=16, per_device_train_batch_size=4, max_steps=4, report_to="none", bf16="false", **flags)
    return [word for name, value in given.items() for word in (f"--{name}", value)]


UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo("alice/as-it-is")
HfApi().upload_folder(folder_path={folder!r}, repo_id="alice/as-it-is", ignore_patterns=["checkpoint-*"])
"""
LOAD = """
import json, sys
for name in ("hf_relpos", "datasets", "accelerate", "evaluate", "matplotlib"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens, logits = torch.arange(2, 22).reshape(2, 10), {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    written = model.generate(**tokenizer("the state", return_tensors="pt"), max_new_tokens=3)[0]
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert text.startswith("the state"), text
    logits[name] = model(tokens).logits.tolist()
print("LOGITS", json.dumps(logits))
"""


def test_from_training_to_a_process_without_the_package(hub, client, tmp_path, corpus_files, without_native):
    flags = training_flags(corpus_files, pos_embedding_type="linear_cpb", vocab_size=300, config_overrides=TINY)
    client.check("train", *flags, "--output_dir", tmp_path / "made")
    lengths = ["--validation_file", corpus_files / "valid.txt", "--eval_lengths", 16, 32, "--max_windows", 4]
    evaluated = ["--model_name_or_path", tmp_path / "made", "--output_dir", tmp_path / "made" / "evaluation"]
    client.check("evaluate", *evaluated, *lengths)
    printed = client.check("push_to_hub", tmp_path / "made", "alice/pushed")
    (line,) = (line for line in printed.splitlines() if line.startswith("pushed "))
    assert line.startswith("pushed alice/pushed, trained on train+valid.txt: ")
    assert line.endswith(hub.commits("alice/pushed")[0].oid)

    # a folder that is uploaded as it is does not tell where the text lies
    assert (tmp_path / "made" / LOCAL_RECORD).is_file()
    client.check(UPLOAD.format(folder=str(tmp_path / "made")))
    assert "model.safetensors" in hub.files("alice/as-it-is") and LOCAL_RECORD not in hub.files("alice/as-it-is")

    # the Trainer pushes each checkpoint and the end
    hubbed = ["--push_to_hub", "true", "--hub_private_repo", "true", "--save_steps", 2]
    client.check("train", *flags, *hubbed, "--hub_model_id", "alice/trained", "--output_dir", tmp_path / "trained")
    titles = [commit.title for commit in hub.commits("alice/trained")]
    assert titles[0] == "End of training" and "Training in progress, step 2" in titles
    assert hub.repos["model", "alice/trained"].private
    for commit in hub.commits("alice/trained")[:-1]:  # each of them says what was trained on what
        record = json.loads(hub.files("alice/trained", commit.oid)["training.json"])
        assert record["corpus"]["name"] == "train+valid.txt" and record["num_steps"] in (2, 4)
        assert (record["num_steps"] == 2) == ("step 2" in commit.title)

    # a child of what lies on the Hub, which evaluates from there too
    flags = training_flags(
        corpus_files, model_name_or_path="alice/pushed", hub_model_id="alice/child", push_to_hub="true"
    )
    flags[flags.index("--block_size") + 1] = 32
    client.check("finetune", *flags, "--output_dir", tmp_path / "child")
    where = ["--model_name_or_path", "alice/child", "--output_dir", tmp_path / "child" / "evaluation"]
    client.check("evaluate", *where, *lengths)
    result = json.loads((tmp_path / "child" / "evaluation" / "results.json").read_text())
    assert result["training"]["base_model"] == "alice/pushed" and result["seed"] == 42
    card = hub.files("alice/child")["README.md"].decode()
    assert "base_model: alice/pushed" in card and "which was trained at 16 tokens" in card
    assert card.index("hf-relpos train") < card.index("hf-relpos finetune")

    # every repository is whole, and tells nothing of this machine
    complete = {".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"}
    complete |= {"tokenizer.json", "tokenizer_config.json", "training.json", *(file.name for file in code_files())}
    results = {"evaluation/results.json", "evaluation/loss_by_position.png"}
    for name, more in {"pushed": results, "trained": set(), "child": set()}.items():
        files = hub.files(f"alice/{name}")
        assert set(files) == complete | more, name
        for path, content in files.items():
            for secret in (str(tmp_path), str(corpus_files), TOKEN):
                assert secret.encode() not in content, path
    assert "Perplexity at 32" in hub.files("alice/pushed")["README.md"].decode()

    expected = {}
    for name, folder in {"pushed": "made", "trained": "trained", "child": "child"}.items():
        model = RelPosForCausalLM.from_pretrained(tmp_path / folder)
        expected[f"alice/{name}"] = model(torch.arange(2, 22).reshape(2, 10)).logits
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *expected],
        env=hub.environment(tmp_path / "elsewhere"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(done.stdout.rpartition("LOGITS ")[2])
    for name, logits in expected.items():
        assert torch.equal(torch.tensor(loaded[name]), logits), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "alibi")


def test_pushing_again_changes_and_withdraws(hub, client, saved, name, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    client.check("push_to_hub", folder, name)
    first = hub.commits(name)
    assert [commit.title for commit in first] == ["Upload model", "initial commit"]  # one commit
    requests = len(hub.requests)
    assert "nothing was sent" in client.check("push_to_hub", folder, name)
    assert hub.commits(name) == first
    assert not [line for line in hub.requests[requests:] if line[0] == "PUT" or "/commit/" in line[1]]

    # to a branch and a pull request, beside main
    make_model("alibi", num_hidden_layers=1).save_pretrained(folder)
    client.check("push_to_hub", folder, name, "--revision", "small", "--commit_message", "one layer")
    assert hub.commits(name, "small")[0].title == "one layer" and hub.commits(name) == first
    assert "/discussions/1" in client.check("push_to_hub", folder, name, "--create_pr", "true")
    assert hub.commits(name) == first
    assert hub.files(name, "refs/pr/1") == hub.files(name, "small")

    # weights in shards in place of one file, and pickles that somebody left: the old ones go in the same commit
    model = RelPosForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    hub.create(
        "alice/old",
        {"config.json": b'{"model_type": "relpos", "pos_embedding_type": "alibi"}', "pytorch_model.bin": b"x"},
    )
    client.check("push_to_hub", folder, "alice/old")
    names = set(hub.files("alice/old"))
    assert "pytorch_model.bin" not in names and "model.safetensors.index.json" in names
    client.check("push_to_hub", folder, name)
    assert "model.safetensors" not in hub.files(name) and len(hub.commits(name)) == 3

    # a card that a person edited stays as it is, here and there
    (folder / "README.md").write_text("# mine\n", encoding="utf-8")
    client.check("push_to_hub", folder, name)
    assert hub.files(name)["README.md"] == b"# mine\n"
    (folder / "README.md").unlink()
    assert "was edited there: it stays" in client.check("push_to_hub", folder, name)
    assert hub.files(name)["README.md"] == b"# mine\n"


def test_a_model_in_memory_takes_along_what_its_folder_tells(hub, client, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    RelPosForCausalLM.from_pretrained(saved).save_pretrained(folder, max_shard_size="40KB")  # and is saved as one
    code = f"""
from hf_relpos import RelPosForCausalLM
model = RelPosForCausalLM.from_pretrained({str(folder)!r})
print(model.push_to_hub("alice/memory", tags=["tiny"], private=True))
"""
    client.check(code)
    files = hub.files("alice/memory")
    assert {"README.md", "tokenizer.json", "model.safetensors", "modeling_relpos.py"} <= set(files)
    assert "- tiny" in files["README.md"].decode() and "alice/memory" in files["README.md"].decode()
    assert hub.repos["model", "alice/memory"].private


@pytest.mark.parametrize("kind", ["token", "reads", "wrong", "namespace", "taken", "name", "public"])
def test_what_the_hub_refuses(hub, client, saved, name, kind):
    flags, environment = [], {}
    if kind == "token":
        environment, expected = {"HF_TOKEN": ""}, "there is no token of the Hub: `hf auth login`"
    elif kind == "reads":
        environment, expected = {"HF_TOKEN": READ_ONLY_TOKEN}, "no right to write there (HTTP 403"
    elif kind == "wrong":
        environment, expected = (
            {"HF_TOKEN": "hf_nobody"},
            "the token is not valid; `hf auth login`",
        )
    elif kind == "namespace":
        name, expected = "bob/m", "no right to write there (HTTP 403"
    elif kind == "taken":
        hub.create(name, {"config.json": b'{"model_type": "gpt2"}'})
        expected = f"the name is taken: '{name}' holds another model (`model_type` is 'gpt2', not 'relpos')"
    elif kind == "name":
        name, expected = "no/such/name", "Repo id must be in the form"
    elif kind == "public":
        hub.create(name)
        flags, expected = ["--private", "true"], f"'{name}' exists and is public"
    before = {key: repo.find("main").oid for key, repo in hub.repos.items()}
    assert expected in client.refuse("push_to_hub", saved, name, *flags, **environment)
    assert {key: repo.find("main").oid for key, repo in hub.repos.items()} == before
    if kind == "taken":
        client.check("push_to_hub", saved, name, "--overwrite", "true")
        assert "model.safetensors" in hub.files(name)


@pytest.mark.parametrize(
    "fault, expected",
    [
        (lambda hub: hub.fail("POST /api/repos/create"), "the Hub failed (HTTP 500"),
        (lambda hub: hub.fail("POST .*/commit/"), "the Hub failed (HTTP 500"),
        (lambda hub: hub.fail("POST .*/commit/", status=412, message="stale"), "somebody else wrote to it"),
        (lambda hub: hub.fail("PUT /upload/", status=403, message="quota exceeded"), "quota exceeded"),
        (lambda hub: hub.fail("PUT /upload/", status=507, message="disk full"), "there is no space left"),
        (lambda hub: hub.cut("POST .*/commit/", after_bytes=5000), "the connection failed"),
    ],
    ids=["create", "commit", "stale", "quota", "disk of the Hub", "cut commit"],
)
def test_a_fault_publishes_nothing_and_the_same_command_completes_it(hub, client, saved, name, fault, expected):
    fault(hub)
    line = client.refuse("push_to_hub", saved, name)
    assert expected in line and ("The same command continues." in line) == ("HTTP 403" not in line)
    assert ("model", name) not in hub.repos or set(hub.files(name)) == {".gitattributes"}
    client.check("push_to_hub", saved, name)
    assert "model.safetensors" in hub.files(name) and len(hub.commits(name)) == 2


@pytest.mark.parametrize("step", ["PUT /upload/", "POST .*/preupload/"])
def test_a_short_fault_is_waited_out(hub, client, saved, name, step):
    hub.cut(step, after_bytes=100)
    printed = client.check("push_to_hub", saved, name)
    assert "/upload/" not in printed  # signed addresses are secrets
    assert len(hub.commits(name)) == 2


def test_an_answer_that_is_lost_is_no_second_commit(hub, client, saved, name):
    hub.cut("POST .*/commit/", of_answer=True)
    assert "the connection failed" in client.refuse("push_to_hub", saved, name)
    assert "model.safetensors" in hub.files(name)  # the commit was made
    assert "nothing was sent" in client.check("push_to_hub", saved, name)
    assert len(hub.commits(name)) == 2


PLAIN_TRAINER = """
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments
from hf_relpos import RelPosForCausalLM
model = RelPosForCausalLM.from_pretrained({saved!r})
rows = [dict(input_ids=row, labels=row) for row in torch.randint(2, 97, (4, 8))]
where = dict(output_dir={folder!r}, push_to_hub=True, hub_model_id={name!r}, hub_strategy="end")
args = TrainingArguments(max_steps=1, report_to="none", use_cpu=True, save_strategy="no", **where)
trainer = Trainer(model=model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained({saved!r}))
trainer.train()
trainer.push_to_hub()
"""


def test_the_plain_trainer_pushes_what_loads_and_the_script_completes_it(hub, client, saved, name, tmp_path):
    folder = tmp_path / "plain"
    client.check(PLAIN_TRAINER.format(saved=str(saved), folder=str(folder), name=name))
    files = hub.files(name)
    assert {"config.json", "model.safetensors", "modeling_relpos.py", "tokenizer.json"} <= set(files)
    assert "training_args.bin" in files and "generated_from_trainer" in files["README.md"].decode()
    client.check("push_to_hub", folder, name)
    files = hub.files(name)
    assert "training_args.bin" not in files and is_generated(files["README.md"].decode())


def test_training_refuses_a_hub_that_it_cannot_push_to_before_the_first_step(hub, client, tmp_path, corpus_files):
    flags = training_flags(corpus_files, vocab_size=300, config_overrides=TINY, push_to_hub="true")
    flags += ["--output_dir", tmp_path / "run"]
    assert "no token" in client.refuse("train", *flags, HF_TOKEN="")
    assert "HTTP 403" in client.refuse("train", *flags, "--hub_model_id", "bob/run")
    assert "`hub_strategy` must be 'end' or 'every_save'" in client.refuse(
        "train", *flags, "--hub_strategy", "checkpoint"
    )
    assert not (tmp_path / "run").exists()

    # a name that is taken, by the same scheme too
    config = b'{"model_type": "relpos", "pos_embedding_type": "linear_cpb"}'
    hub.create("alice/taken", {"config.json": config, "training.json": b'{"seed": 7}'})
    line = client.refuse("train", *flags, "--hub_model_id", "alice/taken")
    assert "the name is taken" in line and "`seed` is 7, not 42" in line and "--hub_overwrite true" in line
    assert not (tmp_path / "run").exists()

    # a push in the middle that fails does not stop the training, and the last one makes it good
    hub.fail("POST .*/commit/")
    client.check("train", *flags, "--save_steps", 2)
    assert hub.commits("alice/run")[0].title == "End of training" and "training.json" in hub.files("alice/run")


def test_a_short_name_is_completed(hub, client, saved):
    client.check("push_to_hub", saved, "short")
    assert 'from_pretrained("alice/short"' in hub.files("alice/short")["README.md"].decode()
