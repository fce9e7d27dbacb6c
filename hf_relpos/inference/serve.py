"""`hf-relpos serve DIR`: `transformers serve` for models of the family.

`transformers serve` looks a model's class up by name among those of transformers itself, so it finds no custom code,
trusted or not. Here the class is put there first; server and options are those of transformers.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_serve_available

from ..cli import command
from ..model.attention_mask import check_implementation
from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM


USAGE = "hf-relpos serve DIR [options of `transformers serve`, see `hf-relpos serve --help`]"


def check_model(name: str, options: Sequence[str]) -> None:
    """Raises `ValueError` unless `name` is a folder with a language model of the family that can be served this way."""
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name!r} is not a folder with a saved model: {USAGE}")
    try:
        fields, _ = RelPosConfig.get_config_dict(name)
    except OSError as error:  # no JSON
        raise ValueError(f"the configuration of {name!r} cannot be read: {error}") from error
    if fields.get("model_type") != RelPosConfig.model_type:
        raise ValueError(f"{name!r} is not a model of the family ('relpos'), got {fields.get('model_type')!r}.")
    if fields.get("architectures") != [RelPosForCausalLM.__name__]:
        raise ValueError(f"{name!r} must hold a {RelPosForCausalLM.__name__}, got {fields.get('architectures')}.")
    if "--continuous-batching" in options:  # the model would refuse it too, but only at the first request
        check_implementation(RelPosConfig.from_dict(fields), "paged|sdpa (--continuous-batching)")


def adapt_server(name: str) -> None:
    """Makes transformers' server load the family, list the model it serves, and say what is wrong with a request."""
    from fastapi.responses import JSONResponse
    from transformers.cli.serving import model_manager, server

    build_server = server.build_server
    listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": ""}

    def answer(request: Any, error: Exception) -> JSONResponse:  # in OpenAI's form: its client shows this message
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    def build(*args: Any, **kwargs: Any) -> Any:
        app = build_server(*args, **kwargs)
        # no chat template, or a text past a learned table: else "Internal Server Error" without the reason
        app.add_exception_handler(ValueError, answer)
        return app

    setattr(model_manager.transformers, RelPosForCausalLM.__name__, RelPosForCausalLM)
    # otherwise it lists the Hub cache, whose models this server does not have
    model_manager.ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [listed])
    server.build_server = build


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
        check_model(arguments[1], arguments[2:])
        adapt_server(arguments[1])
    app(arguments)


if __name__ == "__main__":
    main()
