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
from ..model_loading import NOT_FINITE, check_folder, check_size, not_finite, warn_of_edits
from .serving_limits import FollowClient, follow_clients, limit_handler, pin_model, pop_cap, start_empty_prompts


USAGE = (
    "hf-relpos serve DIR [--max_new_tokens N: what a request may ask for, the model's max_position_embeddings by "
    "default] [options of `transformers serve`, see `hf-relpos serve --help`]"
)


def check_model(name: str, options: Sequence[str]) -> RelPosConfig:
    """→ the configuration of a folder; raises `ValueError` unless it holds a language model of the family that can be
    served this way."""
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is not a folder with a saved model: {USAGE}")
    check_folder(name, "the folder")
    fields = read_json(Path(name) / "config.json")
    if fields.get("model_type") != RelPosConfig.model_type:
        raise ValueError(f"{name!r} is not a model of the family ('relpos'), got {fields.get('model_type')!r}.")
    if fields.get("architectures") != [RelPosForCausalLM.__name__]:
        raise ValueError(f"{name!r} must hold a {RelPosForCausalLM.__name__}, got {fields.get('architectures')}.")
    with reading(f"{name!r} cannot be served"):
        config = RelPosConfig.from_dict(fields)
        check_size(config)
        for path in sorted(Path(name).glob("model*.safetensors")):
            if key := not_finite(path):
                raise ValueError(f"the weights are not finite: {key!r} in {path.name!r} {NOT_FINITE}")
    warn_of_edits(name)
    if "--continuous-batching" in options:  # the model would refuse it too, but only at the first request
        with reading("--continuous-batching"):
            check_continuous_batching(config)
    return config


def adapt_server(name: str, cap: int) -> None:
    """Makes transformers' server load the family, list the model it serves, limit what a request costs, and say what is
    wrong with one.

    Args:
        name: folder of the model.
        cap: new tokens of a request at most.
    """
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from transformers.cli.serving import model_manager, server

    build_server = server.build_server
    listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": ""}

    def answer(request: Any, error: Exception) -> JSONResponse:  # in OpenAI's form: its client shows this message
        reason = (
            f"{type(error).__name__}: {error}"
            if isinstance(error, (LookupError, TypeError, AttributeError))
            else str(error)
        )
        return JSONResponse({"error": {"message": reason, "type": "invalid_request_error"}}, status_code=400)

    def build(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(build_server).bind(*args, **kwargs).arguments
        for handler in given.values():
            if hasattr(handler, "_build_generation_config"):
                limit_handler(handler, cap)
        pin_model(given["model_manager"])
        start_empty_prompts(given["completion_handler"])
        follow_clients(given["generation_state"])
        app = build_server(*args, **kwargs)
        # no chat template, a text past a learned table, a field that is missing or of another type: else "Internal
        # Server Error" without the reason
        for kind in (ValueError, LookupError, TypeError, AttributeError, TemplateError):
            app.add_exception_handler(kind, answer)
        app.add_middleware(FollowClient)
        return app

    setattr(model_manager.transformers, RelPosForCausalLM.__name__, RelPosForCausalLM)
    # otherwise it lists the Hub cache, whose models this server does not have
    model_manager.ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [listed])
    server.build_server = build


def _say_when_up(words: Sequence[str]) -> None:
    """Makes the server say how it is asked, as soon as it listens."""
    import uvicorn

    startup = uvicorn.Server.startup

    async def startup_and_say(self: Any, *args: Any, **kwargs: Any) -> None:
        await startup(self, *args, **kwargs)
        if self.started:
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
    if not is_serve_available():
        raise ValueError('serving needs more packages: pip install "transformers[serving]"')
    from transformers.cli.transformers import app

    if arguments[1] not in ("--help", "-h"):
        cap = pop_cap(arguments)
        config = check_model(arguments[1], arguments[2:])
        adapt_server(arguments[1], cap or config.max_position_embeddings)
        _say_when_up(request_command(arguments))
    app(arguments)


if __name__ == "__main__":
    main()
