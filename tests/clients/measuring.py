"""What looks at a model: benchmarks, embeddings, pictures of attention, attributions."""

import json
import math
from types import SimpleNamespace

import torch
from clients.harness import CLOSE, Subject, client


TASK = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
"""


@client("lm-eval", "lm_eval")
def run_lm_eval(subject: Subject):
    """The rolling log-likelihood of texts: the perplexity by the model's own logits."""
    import pytest
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    texts, model = subject.texts(4), subject.load()
    (subject.out / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (subject.out / "own_text.yaml").write_text(TASK % (subject.out / "test.jsonl"))
    options = {"max_length": 256, "device": "cpu", "batch_size": 2, "dtype": "float32"}
    judge = HFLM(str(subject.folder), trust_remote_code=True, **options)
    manager = TaskManager(include_path=str(subject.out))
    found = simple_evaluate(judge, tasks=["own_text"], task_manager=manager, bootstrap_iters=0, log_samples=False)
    total = words = 0
    for text in texts:
        tokens = torch.tensor([[1, *subject.tokenizer(text)["input_ids"]]])
        total += model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        words += len(text.split())
    assert found["results"]["own_text"]["word_perplexity,none"] == pytest.approx(math.exp(total / words), rel=1e-3)


@client("sentence-transformers", "sentence-transformers")
def run_sentence_transformers(subject: Subject):
    """Mean-pooled embeddings of texts of several lengths in one batch: the means of the hidden states of each alone."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoModel

    trust = {"trust_remote_code": True}
    body = Transformer(str(subject.folder), model_kwargs=trust, processor_kwargs=trust, config_kwargs=trust)
    texts = subject.texts(4)
    made = SentenceTransformer(modules=[body, Pooling(64, "mean")], device="cpu").encode(texts, convert_to_tensor=True)
    model = AutoModel.from_pretrained(subject.folder, **trust).eval()
    rows = []
    for text in texts:
        tokens = body.preprocess([text])  # by the chat template, where there is one
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        rows.append(model(**tokens).last_hidden_state[0].mean(0))
    torch.testing.assert_close(made, torch.stack(rows), rtol=1e-3, atol=1e-3)


@client("BertViz", "bertviz", "IPython")
def run_bertviz(subject: Subject):
    """`model_view` and `head_view` of the attention weights, with `attn_implementation="eager"`."""
    from bertviz import head_view, model_view

    model, tokens = subject.load(attn_implementation="eager"), subject.tokens(1, 9)
    attentions = model(tokens, output_attentions=True).attentions
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 4, 9))
    names = subject.tokenizer.convert_ids_to_tokens(tokens[0])
    for view in (head_view, model_view):
        assert len(view(attentions, names, html_action="return").data) > 1000


@client("Captum", "captum")
def run_captum(subject: Subject):
    """Integrated gradients of the embeddings add up to the difference of the logits; `LLMAttribution` by ablation, the
    same with and without cached outputs."""
    from captum.attr import FeatureAblation, LayerIntegratedGradients, LLMAttribution, TextTemplateInput

    model, tokens = subject.load(), subject.tokens(1, 9)
    baseline = torch.ones_like(tokens)

    def integrated_gradients() -> str:
        def score(tokens):
            return model(tokens).logits[:, -1, 5]

        method = LayerIntegratedGradients(score, model.get_input_embeddings())
        parts, delta = method.attribute(tokens, baseline, n_steps=200, return_convergence_delta=True)
        difference = (score(tokens) - score(baseline)).item()
        assert abs(parts.sum().item() - difference) < 0.05 * max(1, abs(difference)), f"off by {delta.item():.3f}"
        return f"off by {abs(delta.item()):.4f}"

    def ablate(cached: bool) -> torch.Tensor:
        words = TextTemplateInput("{} of the {}", ["state", "union"])
        method = LLMAttribution(FeatureAblation(model), subject.tokenizer)
        return method.attribute(words, target=" people war", skip_tokens=[1], use_cached_outputs=cached).seq_attr

    def ablation() -> None:
        assert ablate(cached=False).abs().sum() > 0

    def cached_ablation() -> None:
        torch.testing.assert_close(ablate(cached=True), ablate(cached=False), **CLOSE)

    names = {"LLMAttribution": ablation, "LLMAttribution, cached outputs": cached_ablation}
    return {"integrated gradients": integrated_gradients, **names}


@client("torch.func", "torch")
def run_torch_func(subject: Subject):
    """`grad` and `vmap(grad)` by `functional_call`: the gradients of `backward`, of all rows and of each."""
    from torch.func import functional_call, grad, vmap

    model, tokens = subject.load(), subject.tokens(3, 8)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, tokens):
        options = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        return functional_call(model, parameters, (), options).loss

    def check(made, tokens):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(made[name], parameter.grad, rtol=1e-3, atol=1e-5)

    def per_row() -> None:
        rows = vmap(grad(lambda parameters, row: loss(parameters, row[None])), in_dims=(None, 0))(parameters, tokens)
        for index, row in enumerate(tokens):
            check({name: value[index] for name, value in rows.items()}, row[None])

    return {"grad": lambda: check(grad(loss)(parameters, tokens), tokens), "vmap(grad)": per_row}


LIGHTEVAL_TASK = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def ask(line, task_name=None):
    return Doc(task_name=task_name, query=line["query"], choices=line["choices"], gold_index=0)

options = {"hf_avail_splits": ["test"], "evaluation_splits": ["test"], "metrics": [Metrics.loglikelihood_acc]}
TASKS_TABLE = [LightevalTaskConfig("own_choice", ask, "%s", "default", **options)]
"""


@client("lighteval", "lighteval")
def run_lighteval(subject: Subject):
    """A multiple-choice task of one's own: the accuracy by the model's own log-likelihoods. The table of another task,
    which it would download first, is withheld."""
    import requests
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.models.transformers.transformers_model import TransformersModelConfig
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    texts, model = subject.texts(16), subject.load()
    rows = [{"query": text, "choices": [" people", " war", " the"]} for text in texts]
    requests.get = lambda *_: SimpleNamespace(status_code=404)
    (subject.out / "data").mkdir()
    (subject.out / "data" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (subject.out / "own_choice.py").write_text(LIGHTEVAL_TASK % (subject.out / "data"))
    settings = PipelineParameters(
        launcher_type=ParallelismManager.NONE, custom_tasks_directory=str(subject.out / "own_choice.py")
    )
    options = {"trust_remote_code": True, "dtype": "float32", "batch_size": 4, "add_special_tokens": False}
    pipeline = Pipeline(
        tasks="own_choice|0",
        pipeline_parameters=settings,
        evaluation_tracker=EvaluationTracker(output_dir=str(subject.out / "results")),
        model_config=TransformersModelConfig(model_name=str(subject.folder), **options),
    )
    pipeline.evaluate()
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            start = len(subject.tokenizer(row["query"])["input_ids"])
            tokens = subject.tokenizer(row["query"] + choice, return_tensors="pt")["input_ids"]
            log_probs = model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
            scores.append(log_probs.gather(-1, tokens[0, start:, None]).sum().item())
        right += scores[0] == max(scores)
    (accuracy,) = {value for name, value in pipeline.get_results()["results"]["all"].items() if name == "acc"}
    assert accuracy == right / len(rows), f"accuracy {accuracy}, by the logits {right / len(rows)}"
    return f"accuracy {accuracy:.2f}"
