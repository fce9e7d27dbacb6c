"""The scripts as a user runs them: train, resume, finetune, evaluate, generate, report, and what bad input gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCHEMES, load_script, make_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from hf_relpos import RelPosForCausalLM, training
from hf_relpos.results.result_file import REQUIRED_KEYS, labels
from hf_relpos.tasks.arguments import DataArguments
from hf_relpos.training.arguments import RelPosTrainingArguments
from hf_relpos.training.interrupt import InterruptCallback
from hf_relpos.training.model_setup import ModelArguments, new_model
from hf_relpos.training.train import train


TINY = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2"


@pytest.fixture(scope="module")
def data_flags(corpus_files):
    return ["--train_file", corpus_files / "train", "--validation_file", corpus_files / "valid.txt"]


def training_flags(data_flags, output_dir, **overrides):
    flags = {"output_dir": output_dir, "block_size": 32, "max_steps": 6, "per_device_train_batch_size": 4}
    flags |= {"eval_steps": 6, "save_steps": 3, "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true"}
    flags |= {"bf16": "false"}  # the same numbers on every machine
    flags |= {"vocab_size": 300, "config_overrides": TINY, "learning_rate": "1e-3", **overrides}
    given = [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    return [*data_flags, *given]


def finetuning_flags(data_flags, model, output_dir, **overrides):
    fields = {"vocab_size": None, "config_overrides": None, "model_name_or_path": model, **overrides}
    return training_flags(data_flags, output_dir, **fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_flags):
    """→ a folder with a model of each of four kinds, trained for 6 steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for scheme in ("none", "linear_cpb", "learned", "rotary"):
            flags = training_flags(data_flags, folder / scheme, pos_embedding_type=scheme)
            patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
            load_script("train").main()
    return folder


def run_in_shell(name, flags, **kwargs):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **kwargs)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- training


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the default is the GPU's")
@pytest.mark.parametrize("has_matrix_units", [True, False])
def test_bf16_is_the_default_where_it_is_faster(has_matrix_units, monkeypatch):
    monkeypatch.setattr(training, "cpu_has_fast_bf16", lambda: has_matrix_units)
    args = RelPosTrainingArguments(output_dir="x")
    assert args.bf16 == args.use_cpu == has_matrix_units
    assert not RelPosTrainingArguments(output_dir="x", bf16=False).bf16
    assert RelPosTrainingArguments(output_dir="x", bf16=True, use_cpu=True).bf16


def test_the_recipe_is_the_notebooks(tmp_path):
    args = RelPosTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, str(args.lr_scheduler_type.value), args.max_grad_norm) == (2e-4, "constant", 1.0)
    assert (args.max_steps, args.per_device_train_batch_size, args.block_size) == (10_000, 128, 128)
    assert (args.weight_decay, args.seed, args.data_seed, args.prediction_loss_only) == (0.0, 42, 42, True)
    assert RelPosTrainingArguments(output_dir="x", block_size=2048, use_cpu=True).per_device_train_batch_size == 8
    assert RelPosTrainingArguments(output_dir="x", num_train_epochs=2, use_cpu=True).max_steps == -1


def test_training_saves_a_model_its_tokenizer_and_a_record(trained):
    folder = trained / "linear_cpb"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is RelPosForCausalLM and len(tokenizer) == model.config.vocab_size == 300
    assert model.config.train_length == 32 and model.config.use_cache
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert model.config.pad_token_id == tokenizer.pad_token_id
    record = json.loads((folder / "training.json").read_text())
    assert (record["num_steps"], record["num_tokens"], record["seed"]) == (6, 6 * 4 * 32, 42)
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert record["validation_loss"] > 0 and record["tokens_per_second"] > 0
    assert (
        record["corpus"]["name"] == "train+valid.txt"
        and record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
def test_what_all_schemes_have_starts_the_same(scheme):
    plain, model = (new_model(make_config(name), seed=3).state_dict() for name in ("none", scheme))
    assert all(torch.equal(model[name], plain[name]) for name in plain)
    assert not torch.equal(
        new_model(make_config(scheme), seed=4).state_dict()["lm_head.weight"], plain["lm_head.weight"]
    )


def test_learned_tables_hold_what_is_trained(trained):
    assert AutoModelForCausalLM.from_pretrained(trained / "learned").config.max_position_embeddings == 32
    assert AutoModelForCausalLM.from_pretrained(trained / "none").config.max_position_embeddings == 2048


def test_data_come_in_one_order_for_every_scheme_and_seed(data_flags, tmp_path, monkeypatch, run_script):
    """What the model sees, step by step; another --data_seed gives another order."""
    seen: list[list] = []
    forward = RelPosForCausalLM.forward

    def recording(self, input_ids=None, **kwargs):
        if self.training:
            seen[-1].append(input_ids.clone())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(RelPosForCausalLM, "forward", recording)
    runs = [("alibi", 42, 42), ("alibi", 7, 42), ("learned", 365, 42), ("alibi", 42, 7)]
    for index, (scheme, seed, data_seed) in enumerate(runs):
        seen.append([])
        overrides = dict(pos_embedding_type=scheme, seed=seed, data_seed=data_seed, max_steps=3, eval_strategy="no")
        # RelPosForCausalLM.forward decides which columns the Trainer keeps
        overrides["remove_unused_columns"] = "false"
        run_script("train", *training_flags(data_flags, tmp_path / str(index), **overrides))
    batches = [torch.stack(run) for run in seen]
    assert batches[0].shape == (3, 4, 32)
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[3])
    assert not same_weights(tmp_path / "0", tmp_path / "1"), "another seed is another model"


def test_resuming_is_the_same_as_not_stopping(data_flags, tmp_path, run_script):
    """Also in the data order, the augmentation's and dropout's random numbers, and the schedule."""
    overrides = dict(pos_embedding_type="learned", position_start_augmentation="true", max_position_embeddings=64)
    overrides |= dict(lr_scheduler_type="cosine", save_total_limit=5)
    run_script("train", *training_flags(data_flags, tmp_path / "whole", **overrides))
    (tmp_path / "parts").mkdir()
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    (tmp_path / "parts" / "checkpoint-5").mkdir()  # killed while it was written
    resumed = training_flags(data_flags, tmp_path / "parts", **overrides, resume_from_checkpoint="last")
    run_script("train", *resumed)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    record = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert (record["resumed_from_step"], record["num_steps"]) == (3, 6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interrupted_run_leaves_a_checkpoint_that_resumes(data_flags, tmp_path, run_script, number):
    overrides = dict(max_steps=100_000, save_steps=100_000, eval_strategy="no", logging_steps=5)
    process = run_in_shell("train", training_flags(data_flags, tmp_path / "run", **overrides))
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "go on with --resume_from_checkpoint last" in output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    steps = int(checkpoint.name.rpartition("-")[2])
    assert not (tmp_path / "run" / "training.json").exists()
    overrides |= dict(max_steps=steps + 2, resume_from_checkpoint="last")
    run_script("train", *training_flags(data_flags, tmp_path / "run", **overrides))
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["resumed_from_step"], record["num_steps"]) == (steps, steps + 2)


# with the older torch, a process on "cpu:0" cannot read the optimizer of a checkpoint
resumes_on_cpus = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot restore to the device cpu:0")


def test_a_request_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    callback, args = InterruptCallback(), SimpleNamespace(world_size=2, device="cpu")
    controls = [SimpleNamespace(should_training_stop=False) for _ in range(2)]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: callback._request(2, None))
    callback.world_size = 2
    for control in controls:
        callback.on_step_end(args, None, control)
    assert [control.should_training_stop for control in controls] == [False, True]


@resumes_on_cpus
def test_two_processes_under_accelerate(data_flags, tmp_path):
    """A Ctrl-C, which the terminal sends to all processes and the launcher sends again, then the rest of the run."""
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "29711"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(ROOT / "scripts" / "train.py")]

    def start(**overrides):
        flags = training_flags(data_flags, tmp_path / "ddp", pos_embedding_type="linear_cpb", **overrides)
        return subprocess.Popen(
            [*command, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    process = start(max_steps=100_000, save_steps=100_000, eval_strategy="no", logging_steps=2)
    for line in process.stdout:
        if "'loss'" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode and "go on with --resume_from_checkpoint last" in output, output[-3000:]
    (checkpoint,) = (tmp_path / "ddp").glob("checkpoint-*")
    steps = int(checkpoint.name.rpartition("-")[2]) + 2

    process = start(max_steps=steps, eval_steps=steps, resume_from_checkpoint="last")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    record = json.loads((tmp_path / "ddp" / "training.json").read_text())
    assert record["num_processes"] == 2 and record["num_tokens"] == 2 * steps * 4 * 32


def test_processes_that_do_not_take_part_are_refused(tmp_path, monkeypatch):
    """As when torchrun starts two on a machine without GPUs and --use_cpu is missing: two runs, one folder."""
    args = RelPosTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but 1 take part"):
        train(ModelArguments(), DataArguments(), args)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_trackers(data_flags, tmp_path, tracker):
    pytest.importorskip(tracker)
    # both folders are read from the environment when the tracker is imported
    folders = {"TENSORBOARD_LOGGING_DIR": tmp_path / "tensorboard", "TRACKIO_DIR": tmp_path / "trackio"}
    flags = training_flags(data_flags, tmp_path / "run", max_steps=2, report_to=tracker, project="relpos-test")
    process = run_in_shell("train", flags, env=os.environ | {name: str(path) for name, path in folders.items()})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert any(path.is_file() and path.stat().st_size for path in (tmp_path / tracker).rglob("*"))


def test_a_tracker_that_is_not_installed(data_flags, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    flags = training_flags(data_flags, tmp_path / "run", report_to="tensorboard")
    assert "`report_to` ['tensorboard'] cannot be served" in refusal(run_script, capsys, "train", flags)


def test_streaming(data_flags, tmp_path, run_script):
    run_script("train", *training_flags(data_flags, tmp_path / "run", streaming="true"))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["num_steps"] == 6


def test_configuration_file_with_flags_on_top(data_flags, tmp_path, run_script):
    flags = training_flags(data_flags, tmp_path / "run", learning_rate=None, max_steps=None, pos_embedding_kwargs=None)
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-3\nmax_steps: 50\npos_embedding_type: log_cpb\npos_embedding_kwargs: {mlp_width: 8}\n"
        "report_to: [none]\nbf16: false\n"
    )
    run_script("train", "--config", tmp_path / "run.yaml", *flags, "--max_steps", 2)
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["num_steps"], record["recipe"]["learning_rate"]) == (2, 1e-3)
    assert (record["pos_embedding_type"], record["pos_embedding_kwargs"]) == ("log_cpb", {"mlp_width": 8})


def test_going_on_with_a_saved_model_at_the_same_length(trained, data_flags, tmp_path, run_script):
    run_script("train", *finetuning_flags(data_flags, trained / "rotary", tmp_path / "on"))
    record = json.loads((tmp_path / "on" / "training.json").read_text())
    assert (record["base_model"], record["pos_embedding_type"]) == ("rotary", "rotary")


# --- finetuning


@pytest.mark.parametrize("scheme", ["none", "linear_cpb", "rotary"])
def test_finetuning_at_a_longer_length(trained, data_flags, tmp_path, run_script, scheme):
    flags = finetuning_flags(data_flags, trained / scheme, tmp_path / "long", block_size=96, max_steps=2)
    run_script("finetune", *flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert model.config.train_length == 96 and model.config.pos_embedding_type == scheme
    record = json.loads((tmp_path / "long" / "training.json").read_text())
    assert (record["train_length"], record["base_train_length"], record["base_model"]) == (96, 32, scheme)


def test_finetuning_a_learned_table(trained, data_flags, tmp_path, run_script, capsys):
    """Refused unless asked for; then the new rows repeat the old ones, and train."""
    flags = finetuning_flags(data_flags, trained / "learned", tmp_path / "long", block_size=80, max_steps=1)
    assert "`block_size` must be at most 32" in refusal(run_script, capsys, "finetune", flags)
    assert not (tmp_path / "long").exists()
    run_script("finetune", *flags, "--extend_learned_positions", "true", "--learning_rate", 0)
    name = "model.position_embeddings.learned.embedding.weight"
    old, new = weights(trained / "learned")[name], weights(tmp_path / "long")[name]
    assert torch.equal(new, torch.cat((old, old, old[:16])))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "long").config.max_position_embeddings == 80


def test_finetuning_with_sampled_positions(trained, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, trained / "rotary", tmp_path / "pose", max_steps=1, position_sampling="pose")
    run_script("finetune", *flags)
    assert json.loads((tmp_path / "pose" / "training.json").read_text())["position_sampling"] == "pose"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pose")
    assert model.config.position_sampling == "pose" and model.config.max_position_embeddings == 2048
    flags = finetuning_flags(data_flags, tmp_path / "pose", tmp_path / "x", position_start_augmentation="true")
    assert "`position_sampling` must be None" in refusal(run_script, capsys, "train", flags)
    flags = finetuning_flags(data_flags, tmp_path / "pose", tmp_path / "off", max_steps=1, position_sampling="none")
    run_script("finetune", *flags)
    assert json.loads((tmp_path / "off" / "training.json").read_text())["position_sampling"] is None


# --- evaluation, report, generation


def test_evaluation_writes_a_result_a_table_and_plots(trained, data_flags, tmp_path, run_script, capsys):
    flags = ["--model_name_or_path", trained / "linear_cpb", "--output_dir", tmp_path / "eval", *data_flags]
    run_script("evaluate", *flags, "--eval_lengths", 32, 64, 128, "--stride", 16)
    result = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(REQUIRED_KEYS) <= set(result)
    assert (result["pos_embedding_type"], result["seed"], result["train_length"]) == ("linear_cpb", 42, 32)
    assert set(result["lengths"]["64"]) == {"loss", "perplexity", "median_loss", "num_tokens"}
    assert len({row["num_tokens"] for row in result["lengths"].values()}) == 1
    assert len(result["loss_by_position"]) == 128 and result["slope"]["slope"] is not None
    assert set(result["sliding_window"]) == {"32", "64", "128"}
    assert result["corpus"]["name"] == "train+valid.txt" and str(tmp_path) not in json.dumps(result)
    for plot in ("loss_by_position.png", "perplexity_by_length.png"):
        assert (tmp_path / "eval" / plot).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| linear_cpb (42) |" in printed and "sliding window of 64 by 16: perplexity" in printed
    assert labels([result, result | {"seed": 7}, result | {"model": "other"}]) == [
        "linear_cpb (42), linear_cpb",
        "linear_cpb (7)",
        "linear_cpb (42), other",
    ]

    run_script("evaluate", *[trained / "rotary" if f == trained / "linear_cpb" else f for f in flags[:3]],
               tmp_path / "eval2", *data_flags, "--eval_lengths", 32, 64)  # fmt: skip
    results = [tmp_path / "eval" / "results.json", tmp_path / "eval2" / "results.json"]
    run_script("report", "--results", *results, "--output_dir", tmp_path / "report")
    table = (tmp_path / "report" / "table.md").read_text()
    assert (
        "linear_cpb (42)" in table
        and "rotary (42)" in table
        and f"{result['lengths']['64']['perplexity']:.2f}" in table
    )


def test_evaluation_of_another_family(tmp_path, trained, data_flags, run_script):
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(trained / "none").save_pretrained(tmp_path / "llama")
    flags = ["--model_name_or_path", tmp_path / "llama", "--output_dir", tmp_path / "eval", *data_flags]
    run_script("evaluate", *flags, "--eval_lengths", 32, 128, "--train_length", 32)
    result = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert result["pos_embedding_type"] is None and result["model"] == "llama" and result["slope"]


def test_generation(trained, tmp_path, run_script, capsys):
    model = ["--model_name_or_path", trained / "rotary"]
    run_script("generate", *model, "--prompt", "the state", "--max_new_tokens", 8)
    streamed = capsys.readouterr().out.strip()
    assert streamed.startswith("the state") and len(streamed) > len("the state")
    (tmp_path / "prompts.txt").write_text("the state\n\na government of the people and\nwar\n")
    files = ["--prompt_file", tmp_path / "prompts.txt", "--output_file", tmp_path / "texts.jsonl"]
    run_script("generate", *model, *files, "--max_new_tokens", 8, "--batch_size", 2)
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the state", "a government of the people and", "war"]
    assert rows[0]["prompt"] + rows[0]["text"].rstrip() == streamed, "batched with padding as alone"
    sampled = []
    for seed in (1, 1, 2):
        run_script("generate", *model, "--prompt", "", "--temperature", 1.5, "--top_p", 0.99, "--seed", seed)
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


def test_pipeline_on_what_training_saved(trained):
    generate = pipeline("text-generation", model=str(trained / "linear_cpb"))
    (output,) = generate("the state of", max_new_tokens=5, do_sample=False)
    assert output["generated_text"].startswith("the state of")


# --- bad input: one line, exit code 2, nothing written


def refusal(run_script, capsys, name, flags) -> str:
    """→ the one line on stderr of a script that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(name, *flags)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


BAD_TRAINING = {
    "unknown scheme": (dict(pos_embedding_type="alibii"), "`pos_embedding_type` must be one of"),
    "unknown option": (dict(pos_embedding_kwargs='{"width": 1}'), "`pos_embedding_kwargs` of 'linear_cpb' may hold"),
    "options that are no JSON": (dict(pos_embedding_kwargs="{width}"), "`pos_embedding_kwargs` must be JSON"),
    "a rotation that is no dictionary": (dict(rope_parameters="[1]"), "`rope_parameters` must be a dictionary"),
    "unknown size": (dict(model_size="tiny"), "`model_size` must be one of"),
    "unknown field": (dict(config_overrides="hidden=3"), "`config_overrides` must be"),
    "field of the tokenizer": (dict(config_overrides="vocab_size=555"), "`config_overrides` must be 'field=value,..'"),
    "no step": (dict(max_steps=0), "`max_steps` must be at least 1, got 0"),
    "no block": (dict(per_device_train_batch_size=0), "`per_device_train_batch_size` must be at least 1, got 0"),
    "no accumulation": (dict(gradient_accumulation_steps=0), "`gradient_accumulation_steps` must be at least 1, got 0"),
    "no evaluation": (dict(max_eval_samples=0), "`max_eval_samples` must be at least 1, got 0"),
    "too short a stream": (
        dict(streaming="true", block_size=100_000),
        "`block_size` 100000 is more than the train split",
    ),
    "heads": (dict(config_overrides="hidden_size=32,num_attention_heads=3"), "`num_attention_heads` must divide"),
    "unknown flag": (dict(no_such_flag=1), "unknown flag: '--no_such_flag'"),
    "no number": (dict(block_size="long"), "invalid int value: 'long'"),
    "length of 0": (dict(block_size=0, per_device_train_batch_size=4), "`block_size` must be at least 2, got 0"),
    "missing file": (dict(train_file="no/such.txt"), "`train_file` 'no/such.txt' does not exist"),
    "missing configuration": (dict(config="no.yaml"), "--config 'no.yaml' cannot be read"),
    "too short a corpus": (dict(block_size=100_000), "`block_size` 100000 is more than the train split holds"),
    "too large a batch": (dict(per_device_train_batch_size=10_000), "a step needs 10000 blocks"),
    "vocabulary of another size": (dict(vocab_size=5000), "`vocab_size` 5000 is more than this corpus gives"),
    "tokenizer of another size": (dict(tokenizer_name="MODEL", vocab_size=400), "but the tokenizer has 300 entries"),
    "no model": (
        dict(model_name_or_path="no/such/folder", vocab_size=None, config_overrides=None),
        "'no/such/folder' is no folder",
    ),
    "two models": (dict(model_name_or_path="MODEL"), "`vocab_size` is that of the saved model"),
    "no checkpoint": (dict(resume_from_checkpoint="last"), "holds no checkpoint"),
    "augmentation without room": (
        dict(position_start_augmentation="true", max_position_embeddings=16, pos_embedding_type="learned"),
        "`block_size` must be at most 16",
    ),
}


@pytest.mark.parametrize("overrides, message", BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_training_refuses(overrides, message, trained, data_flags, tmp_path, run_script, capsys):
    overrides = {name: trained / "linear_cpb" if value == "MODEL" else value for name, value in overrides.items()}
    assert message in refusal(run_script, capsys, "train", training_flags(data_flags, tmp_path / "x", **overrides))
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_a_run_is_refused(trained, data_flags, run_script, capsys):
    before = sorted(path.name for path in (trained / "none").iterdir())
    assert "already holds a run" in refusal(run_script, capsys, "train", training_flags(data_flags, trained / "none"))
    assert sorted(path.name for path in (trained / "none").iterdir()) == before


def test_resuming_with_another_scheme_is_refused(trained, data_flags, tmp_path, run_script, capsys):
    flags = training_flags(data_flags, trained / "none", resume_from_checkpoint="last", pos_embedding_type="alibi")
    assert "`pos_embedding_type` of the checkpoint" in refusal(run_script, capsys, "train", flags)
    flags = finetuning_flags(data_flags, trained / "none", tmp_path / "x", pos_embedding_type="alibi")
    assert "`pos_embedding_type` of the checkpoint" in refusal(run_script, capsys, "train", flags)


def test_finetuning_refuses_what_is_no_model(data_flags, tmp_path, run_script, capsys):
    (tmp_path / "empty").mkdir()
    flags = finetuning_flags(data_flags, tmp_path / "empty", tmp_path / "x")
    assert "holds no config.json" in refusal(run_script, capsys, "finetune", flags)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    flags = finetuning_flags(data_flags, tmp_path / "llama", tmp_path / "x")
    assert "must be a model of the family ('relpos'), got model_type 'llama'" in refusal(
        run_script, capsys, "finetune", flags
    )
    assert "--model_name_or_path is required" in refusal(
        run_script, capsys, "finetune", finetuning_flags(data_flags, None, tmp_path / "x")
    )


def copy_of(model, folder):
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


def other_scheme(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pos_embedding_type": "alibi"}))


def truncated_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def larger_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


SPOILT = {
    "weights of another scheme": (other_scheme, "holds other weights than its configuration says"),
    "truncated weights": (truncated_weights, "cannot be loaded"),
    "a larger tokenizer": (larger_tokenizer, "`vocab_size` of the model is 300, but the tokenizer has 301 entries"),
    "no tokenizer": (no_tokenizer, "no tokenizer can be loaded"),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_model_is_refused_everywhere(spoil, message, trained, data_flags, tmp_path, run_script, capsys):
    spoil(copy_of(trained / "linear_cpb", tmp_path / "spoilt"))
    model = ["--model_name_or_path", tmp_path / "spoilt"]
    flags = finetuning_flags(data_flags, tmp_path / "spoilt", tmp_path / "x")
    assert message in refusal(run_script, capsys, "generate", [*model, "--prompt", "the"])
    assert message in refusal(run_script, capsys, "evaluate", [*model, "--output_dir", tmp_path / "x", *data_flags])
    assert message in refusal(run_script, capsys, "finetune", flags)
    assert not (tmp_path / "x").exists()


BAD_EVALUATION = {
    "length of 0": (["--eval_lengths", 0, 64], "`eval_lengths` must be at least 2"),
    "past a learned table": (["--eval_lengths", 32, 64], "`eval_lengths` must be at most 32"),
    "no such split": (
        ["--eval_lengths", 32, "--eval_split", "dev"],
        "`eval_split` must be one of ['train', 'validation'], got 'dev'",
    ),
    "stride": (["--eval_lengths", 16, 32, "--stride", 32], "`stride` must lie between 1 and"),
    "no windows": (["--eval_lengths", 32, "--max_windows", 0], "`max_windows` must be at least 1, got 0"),
    "abbreviation": (["--conf", "no.yaml"], "unknown flag: '--conf'"),
    "two configurations": (["--config", "a.yaml", "--config", "b.yaml"], "--config takes one file, once"),
    "dtype": (["--dtype", "int8"], "`dtype` must be float32"),
    "missing file": (
        ["--eval_lengths", 32, "--validation_file", "no.txt"],
        "`validation_file` 'no.txt' does not exist",
    ),
}


@pytest.mark.parametrize("flags, message", BAD_EVALUATION.values(), ids=BAD_EVALUATION)
def test_evaluation_refuses(flags, message, trained, data_flags, tmp_path, run_script, capsys):
    common = ["--model_name_or_path", trained / "learned", "--output_dir", tmp_path / "x", *data_flags]
    assert message in refusal(run_script, capsys, "evaluate", [*common, *flags])
    assert not (tmp_path / "x").exists()


BAD_GENERATION = {
    "no prompt": ([], "exactly one of --prompt and --prompt_file"),
    "missing prompts": (["--prompt_file", "no.txt"], "`prompt_file` 'no.txt' does not exist"),
    "no tokens": (["--prompt", "the", "--max_new_tokens", 0], "`max_new_tokens` must be at least 1, got 0"),
    "past a learned table": (["--prompt", "the", "--max_new_tokens", 40], "`max_new_tokens` must be at most"),
    "sampling": (["--prompt", "the", "--max_new_tokens", 4, "--temperature", -1], "temperature"),
    "no output without prompts": (["--prompt", "the", "--output_file", "x"], "`output_file` 'x' must be new"),
}


@pytest.mark.parametrize("flags, message", BAD_GENERATION.values(), ids=BAD_GENERATION)
def test_generation_refuses(flags, message, trained, run_script, capsys):
    model = ["--model_name_or_path", trained / "learned"]
    assert message in refusal(run_script, capsys, "generate", [*model, *flags])


def test_report_refuses(tmp_path, run_script, capsys):
    (tmp_path / "bad.json").write_text('{"lengths": {}}')
    for path, message in (
        (tmp_path / "bad.json", "lacks ['pos_embedding_type'"),
        (tmp_path / "no.json", "cannot be read"),
    ):
        flags = ["--results", path, "--output_dir", tmp_path / "x"]
        assert message in refusal(run_script, capsys, "report", flags)


def test_arguments_are_the_ones_that_users_know():
    names = {
        name for cls in (ModelArguments, DataArguments, RelPosTrainingArguments) for name in cls.__dataclass_fields__
    }
    known = (
        "model_name_or_path block_size output_dir dataset_name dataset_config_name train_file validation_file streaming"
    )
    known += " tokenizer_name config_overrides preprocessing_num_workers validation_split_percentage learning_rate"
    assert set(known.split()) <= names


def test_help_of_a_real_process():
    process = run_in_shell("train", ["--help"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "--pos_embedding_type" in output
