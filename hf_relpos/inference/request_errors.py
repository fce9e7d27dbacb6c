"""What the server says when it cannot answer: everywhere in OpenAI's form, of which its clients show the message."""

import json
from collections.abc import AsyncIterator
from typing import Any


STREAM_ERROR = 'data: {"error": '  # as transformers' server writes one into a stream; in a text its quotes are escaped


class UnknownModelError(ValueError):
    """A request for a model that the server does not have."""


def error_content(message: str, status: int = 400) -> dict[str, Any]:
    """→ the body of an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 and message.startswith("`model`") else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def answer_errors(app: Any) -> None:
    """Makes an app of FastAPI answer all errors in OpenAI's form.

    What is wrong with a request is a 400, another model a 404, what is wrong with the server a 500 or 503.
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.utils import CBWorkerDeadError

    def handle(kind: type[Exception], status: int) -> None:
        def answer(request: Any, error: Exception) -> JSONResponse:
            return JSONResponse(error_content(_reason(error), status), status_code=status)

        app.add_exception_handler(kind, answer)

    def answer_http(request: Any, error: Any) -> JSONResponse:
        status = 400 if error.status_code == 422 else error.status_code
        message = _details(error.detail)
        if status in (404, 405):
            message = f"{request.method} {request.url.path}: {message}"
        return JSONResponse(error_content(message, status), status_code=status, headers=error.headers)

    def answer_invalid(request: Any, error: Any) -> JSONResponse:
        return JSONResponse(error_content(f"the request cannot be read: {_details(error.errors())}"), status_code=400)

    # a text past a learned table, a field that is missing or of another type: else "Internal Server Error"
    for kind in (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        handle(kind, 400)
    handle(UnknownModelError, 404)
    handle(CBWorkerDeadError, 503)
    handle(Exception, 500)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_invalid)


async def errors_in_form(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """The pieces of a stream; an error in it, the last of its piece, is written in OpenAI's form."""
    async for piece in pieces:
        head, mark, text = piece.rpartition(STREAM_ERROR) if isinstance(piece, str) else ("", "", "")
        if mark:  # the message stands between quotes as it is, which is no JSON
            content = error_content(text.strip().removesuffix("}").strip('"'))
            piece = f"{head}data: {json.dumps(content)}\n\n"
        yield piece


def _reason(error: Exception) -> str:
    is_said = isinstance(error, (ValueError, RuntimeError)) or type(error).__module__.startswith("jinja2")
    return str(error) if is_said and str(error) else f"{type(error).__name__}: {error}"


def _details(detail: Any) -> str:
    """What FastAPI says of an error, a text or a list of what is wrong where, in one line."""
    if not isinstance(detail, list):
        return str(detail)
    parts = []
    for each in detail:
        where = ".".join(map(str, each.get("loc", ())))
        more = (each.get("ctx") or {}).get("error")
        parts.append(f"{where}: {each.get('msg')}" + (f" ({more})" if more else ""))
    return "; ".join(parts)
