"""Models in several processes, or with parameters elsewhere: FSDP2, DDP, DeepSpeed, offloading."""

import json
import multiprocessing
import os
import socket
from functools import partial
from types import SimpleNamespace

import torch
from clients.harness import CLOSE, Subject, client, losses_fall


def in_two_ranks(function, *arguments) -> list:
    """→ what the function returned in each of two processes joined by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_run_rank, args=(rank, port, queue, function, arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    made = [queue.get(timeout=200) for _ in ranks]
    for rank in ranks:
        rank.join()
    for result in made:
        if isinstance(result, Exception):
            raise result
    return made


def _run_rank(rank: int, port: int, queue, function, arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        queue.put(function(*arguments))
    except Exception as error:
        import traceback

        traceback.print_exc()
        if not (isinstance(error, ValueError) and len(error.args) == 1):  # others may not survive the pipe
            error = RuntimeError(f"{type(error).__name__}: {error}")
        queue.put(error)
    finally:
        queue.close()
        queue.join_thread()
        os._exit(0)  # without the aborts of gloo's threads


def reference(subject: Subject) -> list[float]:
    """→ the losses of three steps in one process, on the rows of both ranks."""
    model, tokens = subject.load().train(), subject.tokens(4, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def my_rows(subject: Subject) -> torch.Tensor:
    return subject.tokens(4, 24).chunk(2)[int(os.environ["RANK"])]


def mean_over_ranks(losses: list[float]) -> list[float]:
    together = torch.tensor(losses)
    torch.distributed.all_reduce(together)
    return (together / 2).tolist()


def steps(model, optimizer, tokens) -> list[float]:
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return mean_over_ranks(losses)


def close(losses: list[float], expected: list[float]) -> str:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    return losses_fall(losses)


def train_fsdp2(subject: Subject, offload: bool) -> list[float]:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = subject.load().train()
    options = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return steps(model, torch.optim.AdamW(model.parameters(), lr=3e-3), my_rows(subject))


def train_ddp(subject: Subject) -> list[float]:
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(subject.load().train())
    return steps(model, torch.optim.AdamW(model.parameters(), lr=3e-3), my_rows(subject))


@client("DDP and FSDP2 of torch", "torch")
def run_torch_distributed(subject: Subject):
    """Two gloo processes: the losses of one process on the same rows."""

    def check(function, *options) -> str:
        made = in_two_ranks(function, subject, *options)
        return close(made[0], reference(subject))

    return {
        "DDP": partial(check, train_ddp),
        "FSDP2": partial(check, train_fsdp2, False),
        "FSDP2 with offload": partial(check, train_fsdp2, True),
    }


def train_deepspeed(subject: Subject, stage: int, offload: bool) -> list[float]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0}
    deepspeed.init_distributed("gloo")
    keep = HfDeepSpeedConfig(config)  # noqa: F841 with stage 3, from_pretrained splits the parameters as it loads
    model = subject.load().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens, losses = my_rows(subject), []
    for _ in range(3):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return mean_over_ranks(losses)


@client("DeepSpeed", "deepspeed", seconds=400)
def run_deepspeed(subject: Subject):
    """ZeRO in two gloo processes on CPUs: the losses of one process on the same rows."""

    def check(stage: int, offload: bool = False) -> str:
        made = in_two_ranks(train_deepspeed, subject, stage, offload)
        return close(made[0], reference(subject))

    return {"ZeRO-2": partial(check, 2), "ZeRO-3": partial(check, 3), "ZeRO-3, offloaded": partial(check, 3, True)}


@client("accelerate, offloading", "accelerate")
def run_offload(subject: Subject):
    """`device_map` with layers on disk, `cpu_offload`, `disk_offload`: logits and tokens of the model in memory."""
    import accelerate

    tokens, model = subject.tokens(), subject.load()
    expected = model(tokens).logits
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False)

    def check(model) -> None:
        torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)
        assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), generated)

    def device_map() -> None:
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
        names = [name for name, _ in model.model.named_children()]
        places |= {f"model.{name}": "cpu" for name in names if name not in ("embed_tokens", "layers")}
        check(subject.load(device_map=places, offload_folder=str(subject.out / "disk")))

    device = torch.device("cpu")
    return {
        "device_map": device_map,
        "cpu_offload": lambda: check(accelerate.cpu_offload(subject.load(), device)),
        "disk_offload": lambda: check(accelerate.disk_offload(subject.load(), str(subject.out / "d"), device)),
    }


@client("`accelerate estimate-memory`", "accelerate")
def run_estimate(subject: Subject):
    """The size that it gives is that of the parameters. It asks a Hub for the configuration: the folder answers."""
    from accelerate.commands import estimate

    config = json.loads((subject.folder / "config.json").read_text())
    estimate.model_info = lambda *_, **__: SimpleNamespace(library_name="transformers", config=config)
    flags = [str(subject.folder), "--dtypes", "float32", "--trust_remote_code"]
    (row,) = estimate.gather_data(estimate.estimate_command_parser().parse_args(flags))
    model = subject.load()  # whole where the repository has a table of classes, else without a head
    sizes = [4 * sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.model)]
    assert any(0.98 * size < row[2] < 1.02 * size for size in sizes), f"{row[2]} bytes, the parameters take {sizes[0]}"
    return f"{row[2] / 2**20:.2f} MiB"
