"""Which function answers which request: the tables that `api` and `transfers` fill."""

import re
from collections.abc import Callable
from urllib.parse import unquote

from .server import Answer, HubError, Request


FIELDS = {
    "{repos}": r"(?P<kind>model|dataset|space)s",
    "{repo}": r"(?P<kind>model|dataset|space)s/(?P<repo>[^/]+(?:/[^/]+)?)",
    "{page}": r"(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+(?:/[^/]+?)?)",
    "{revision}": r"(?P<revision>refs/pr/\d+|[^/]+)",  # the JavaScript client does not quote it everywhere
    "{name}": r"(?P<name>refs/pr/\d+|[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{number}": r"(?P<number>\d+)",
    "{key}": r"(?P<key>[0-9a-f]+)",
}
Routes = list[tuple[list[str], re.Pattern, Callable]]
HUB_ROUTES: Routes = []
CDN_ROUTES: Routes = []


def route(methods: str, path: str, routes: Routes = HUB_ROUTES) -> Callable:
    """Registers a function of (hub, request, **fields of the path), which returns an Answer or what becomes JSON.

    The path is matched as it was sent, as a quoted "/" is no end of a segment; the function's fields are unquoted, and
    a repository arrives as a Repo and a revision as `commit`, a Commit.
    """
    pattern = re.compile(re.sub(r"{\w+}", lambda field: FIELDS[field[0]], path))

    def register(function: Callable) -> Callable:
        routes.append((methods.split(), pattern, function))
        return function

    return register


def dispatch(hub, request: Request, routes: Routes) -> Answer:
    for methods, pattern, function in routes:
        match = pattern.fullmatch(request.path)
        if match and request.method in methods:
            fields = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            if "repo" in fields:
                fields["repo"] = hub.find_repo(request, fields.pop("kind", "model"), fields["repo"])
            if "revision" in fields:
                fields["commit"] = fields["repo"].find(fields.pop("revision"))
            answer = function(hub, request, **fields)
            return answer if isinstance(answer, Answer) else Answer.of(answer)
    hub.unknown.append(f"{request.method} {request.target}")
    raise HubError(404, "Sorry, we can't find the page you are looking for.")
