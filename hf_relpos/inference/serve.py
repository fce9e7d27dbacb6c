"""`hf-relpos serve DIR`: `transformers serve` for models of the family.

`transformers serve` looks a model's class up by name among those of transformers itself, so it finds no custom code,
trusted or not. Here the class is put there first; server and options are those of transformers, but for
`--max_new_tokens`, what one request may ask for at most. Generation ends when its client has gone.
"""

import inspect
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_serve_available

from ..cli import command
from ..file_reading import read_json, reading
from ..messages import say_command
from ..model.attention_mask import check_continuous_batching
from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model_loading import check_folder, folder_hint, load_model, load_model_tokenizer
from .request_errors import answer_errors
from .request_fields import REQUESTS
from .serving_limits import (
    CLIENT,
    NO_TEMPLATE,
    FollowClient,
    ServedModel,
    follow_clients,
    limit_handler,
    pin_model,
    pop_cap,
    start_empty_prompts,
)
from .stop_texts import cut_parsed


USAGE = (
    "hf-relpos serve DIR [--max_new_tokens N: what a request may ask for, the model's max_position_embeddings by "
    "default] [options of `transformers serve`, see `hf-relpos serve --help`]"
)


def check_model(name: str, options: Sequence[str], cap: int | None = None) -> ServedModel:
    """What requests to the model of a folder are checked by.

    Args:
        name: of the folder.
        options: of the server.
        cap: new tokens of a request at most; `max_position_embeddings` by default.

    Raises:
        ValueError: unless the folder holds a language model of the family, whole and with its tokenizer, that can be
            served this way.
    """
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is no folder with a saved model{folder_hint(name)}.")
    check_folder(name, "the folder")
    fields = read_json(Path(name) / "config.json")
    if fields.get("model_type") != RelPosConfig.model_type:
        raise ValueError(f"{name!r} is not a model of the family ('relpos'), got {fields.get('model_type')!r}.")
    if fields.get("architectures") != [RelPosForCausalLM.__name__]:
        raise ValueError(f"{name!r} must hold a {RelPosForCausalLM.__name__}, got {fields.get('architectures')}.")
    if "--continuous-batching" in options:  # the model would refuse it too, but only at the first request
        with reading("--continuous-batching"):
            check_continuous_batching(RelPosConfig.from_dict(fields))
    model = load_model(name, RelPosForCausalLM, "the folder")  # transformers would fill in what is missing
    tokenizer = load_model_tokenizer(name, model)
    return ServedModel(
        name,
        cap or model.config.max_position_embeddings,
        model.config.vocab_size,
        bool(tokenizer.chat_template),
        bool(getattr(tokenizer, "response_template", None)),
    )


def adapt_server(served: ServedModel) -> None:
    """Makes transformers' server load the family, list the model it serves, limit what a request costs, and say what is
    wrong with one."""
    from transformers.cli.serving import chat_completion, model_manager, response, server

    build_server = server.build_server
    listed = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": ""}

    def build(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(build_server).bind(*args, **kwargs).arguments
        start_empty_prompts(given["completion_handler"])  # first: what is checked later is checked before it
        for name, handler in given.items():
            if hasattr(handler, "_build_generation_config"):
                limit_handler(handler, served, REQUESTS.get(name))
        pin_model(given["model_manager"])
        follow_clients(given["generation_state"])
        app = build_server(*args, **kwargs)
        answer_errors(app)
        app.add_middleware(FollowClient)
        return app

    setattr(model_manager.transformers, RelPosForCausalLM.__name__, RelPosForCausalLM)
    # otherwise it lists the Hub cache, whose models this server does not have
    model_manager.ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [listed])
    for module in (chat_completion, response):
        module.parse_assistant_message = cut_parsed(module.parse_assistant_message, lambda: CLIENT.get().stops)
    server.build_server = build


def _say_when_up(words: Sequence[str], note: str = "") -> None:
    """Makes the server say how it is asked, as soon as it listens."""
    import uvicorn

    startup = uvicorn.Server.startup

    async def startup_and_say(self: Any, *args: Any, **kwargs: Any) -> None:
        await startup(self, *args, **kwargs)
        if self.started:
            if note:
                print(note, file=sys.stderr, flush=True)
            say_command(words)

    uvicorn.Server.startup = startup_and_say


def request_command(arguments: Sequence[str]) -> list[str]:
    """→ the command that asks the server for a text."""
    words = [part for word in arguments for part in word.split("=", 1)]
    options = {"--host": "localhost", "--port": "8000"} | dict(zip(words, words[1:]))
    body = {"model": arguments[1], "prompt": "Once upon a time", "max_tokens": 50}
    address = f"http://{options['--host']}:{options['--port']}/v1/completions"
    return ["curl", address, "-H", "Content-Type: application/json", "-d", json.dumps(body)]


@command
def main() -> None:
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        print(f"usage: {USAGE}")
        return
    if len(arguments) < 2 or arguments[0] != "serve":
        raise ValueError(f"usage: {USAGE}")
    is_help = arguments[1] in ("--help", "-h")
    if not is_serve_available():
        needed = 'serving needs the extra `serve` of hf_relpos: pip install -c constraints.txt -e ".[serve]"'
        if not is_help:
            raise ValueError(needed)
        print(f"usage: {USAGE}\n\n{needed}")
        return
    from transformers.cli.transformers import app

    if not is_help:
        cap = pop_cap(arguments)
        served = check_model(arguments[1], arguments[2:], cap)
        adapt_server(served)
        _say_when_up(request_command(arguments), "" if served.has_chat_template else NO_TEMPLATE)
    app(arguments)


if __name__ == "__main__":
    main()
