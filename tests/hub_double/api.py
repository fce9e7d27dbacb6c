"""Accounts, repositories, references, listings, discussions."""

from .repos import Commit, Discussion, Repo, card_of, describe, is_folder, list_paths, read_card
from .routes import route
from .server import Answer, HubError, Request


def found(commit: Commit | None) -> Commit:
    if commit is None:
        raise HubError(404, "Invalid rev id", "RevisionNotFound")
    return commit


# --- accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub, request):
    user = hub.user(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    role = "read" if request.token in hub.read_only else "write"
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return {"type": "user", "id": user, "name": user, "fullname": user, "isPro": False, "orgs": [], "auth": auth}


@route("GET HEAD POST", "/api/telemetry/{path}")
@route("GET", "/api/agent-harnesses")
def ignore(hub, request, path=None):
    return {}


@route("POST", "/api/repos/create")
def create_repo(hub, request):
    asked = request.json()
    owner = hub.writer(request, asked.get("organization"))
    kind, id = asked.get("type") or "model", f"{owner}/{asked['name']}"
    url = f"{hub.url}/{'' if kind == 'model' else f'{kind}s/'}{id}"
    if (kind, id) in hub.repos:
        raise HubError(409, f"You already created this {kind} repo", url=url, name=id)
    hub.create(id, kind=kind, private=asked.get("visibility") == "private", sdk=asked.get("sdk"))
    return {"url": url, "name": id, "id": id}


@route("DELETE", "/api/repos/delete")
def delete_repo(hub, request):
    asked = request.json()
    owner = asked.get("organization") or hub.writer(request)
    repo = hub.find_repo(request, asked.get("type") or "model", f"{owner}/{asked['name']}")
    hub.writer(request, repo.owner)
    del hub.repos[repo.kind, repo.id]
    return {}


@route("PUT", "/api/{repo}/settings")
def change_settings(hub, request, repo):
    hub.writer(request, repo.owner)
    asked = request.json()
    repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
    repo.gated = asked.get("gated", repo.gated)
    return {"private": repo.private, "gated": repo.gated}


@route("GET", "/api/{repo}/auth-check(?P<write>/write)?")
def check_access(hub, request, repo, write=None):
    if write:
        hub.writer(request, repo.owner)
    hub.check_gate(request, repo)
    return {}


@route("GET", "/api/{repos}")
def list_repos(hub, request, kind):
    user, author = hub.user(request), request.query.get("author")
    repos = [repo for repo in hub.repos.values() if repo.kind == kind and author in (None, repo.owner)]
    return [describe_repo(repo, repo.find("main")) for repo in repos if not repo.private or repo.owner == user]


@route("GET", "/api/{repo}/revision/{revision}")
def show_revision(hub, request, repo, commit):
    described = describe_repo(repo, found(commit), request.asks("blobs"))
    return Answer.of(described, headers={"X-Repo-Commit": commit.oid})


@route("GET", "/api/{repo}")
def show_repo(hub, request, repo):
    return show_revision(hub, request, repo, repo.find("main"))


def describe_repo(repo: Repo, commit: Commit, blobs: bool = False) -> dict:
    card, siblings = card_of(commit.tree), []
    for path, file in sorted(commit.tree.items()):
        siblings.append({"rfilename": path})
        if blobs:
            siblings[-1] |= {"size": len(file.data), "blobId": file.oid}
        if blobs and file.lfs:
            siblings[-1]["lfs"] = {**describe(commit, path)["lfs"], "sha256": file.sha256}
    tags = [card[name] for name in ("library_name", "pipeline_tag") if card.get(name)] + (card.get("tags") or [])
    tags += [f"license:{card['license']}"] if card.get("license") else []
    shown = {"_id": repo.id, "id": repo.id, "author": repo.owner, "sha": commit.oid, "private": repo.private}
    shown |= {"gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": tags, "siblings": siblings}
    shown |= {"lastModified": commit.date, "createdAt": repo.created, "cardData": card or None}
    shown |= {name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if card.get(name)}
    return shown | {"model": {"modelId": repo.id}, "dataset": {}, "space": {"sdk": repo.sdk}}[repo.kind]


@route("POST", "/api/validate-yaml")
def validate_card(hub, request):
    card, error = read_card(request.json()["content"])
    missing = card is None and error is None
    warnings = [{"message": "empty or missing yaml metadata in repo card"}] if missing else []
    return Answer.of({"errors": [{"message": error}] if error else [], "warnings": warnings}, 400 if error else 200)


# --- listings


@route("GET", "/api/{repo}/tree/{revision}(?:/{path})?")
def list_tree(hub, request, repo, commit, path=""):
    tree = found(commit).tree
    if path and not is_folder(tree, path):
        raise HubError(404, f"{path} does not exist", "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
    paths = list_paths(tree, path, request.asks("recursive"))
    rows = [describe(commit, name, request.asks("expand")) for name in paths]
    return page(hub, request, rows, {"X-Repo-Commit": commit.oid})


@route("GET", "/api/{repo}/commits/{revision}")
def list_commits(hub, request, repo, commit):
    rows = []
    for past in found(commit).history():
        row = {"id": past.oid, "title": past.title, "message": past.message, "date": past.date}
        rows.append(row | {"authors": [{"user": past.author}]})
    return page(hub, request, rows, {"X-Total-Count": str(len(rows))})


def page(hub, request: Request, rows: list, headers: dict[str, str]) -> Answer:
    """→ the rows from the cursor on, with a link to the next ones."""
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    if end < len(rows):
        others = "".join(f"{name}={value}&" for name, value in request.query.items() if name != "cursor")
        headers["Link"] = f'<{request.origin}{request.path}?{others}cursor={end}>; rel="next"'
    return Answer.of(rows[start:end], headers=headers)


@route("POST", "/api/{repo}/paths-info/{revision}")
def show_paths(hub, request, repo, commit):
    """What is not there is left out. A form from Python, JSON from JavaScript."""
    asked = request.form()
    expand = str((asked.get("expand") or [""])[0]).lower() == "true"
    known = [path for path in asked.get("paths", []) if path in found(commit).tree or is_folder(commit.tree, path)]
    return [describe(commit, path, expand) for path in known]


# --- references


@route("GET", "/api/{repo}/refs")
def list_refs(hub, request, repo):
    rows = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    groups = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, commit in repo.refs.items():
        _, group, name = ref.split("/", 2)
        name = ref if group == "pr" else name
        rows[groups[group]].append({"name": name, "ref": ref, "targetCommit": commit.oid})
    if not request.asks("include_prs"):
        del rows["pullRequests"]
    return rows


@route("POST", "/api/{repo}/branch/{name}")
def create_branch(hub, request, repo, name):
    hub.writer(request, repo.owner)
    asked = request.json() if request.body else {}
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {name}")
    if f"refs/heads/{name}" in repo.refs and not asked.get("overwrite"):
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[f"refs/heads/{name}"] = found(repo.find(asked.get("startingPoint") or "main"))
    return {}


@route("DELETE", "/api/{repo}/branch/{name}")
def delete_branch(hub, request, repo, name):
    hub.writer(request, repo.owner)
    if name == "main":
        raise HubError(403, "The main branch cannot be deleted")
    return remove_ref(repo, f"refs/heads/{name}")


@route("POST", "/api/{repo}/tag/{revision}")
def create_tag(hub, request, repo, commit):
    hub.writer(request, repo.owner)
    tag = request.json()["tag"]
    if f"refs/tags/{tag}" in repo.refs:
        raise HubError(409, f"Tag {tag} already exists")
    repo.refs[f"refs/tags/{tag}"] = found(commit)
    return {}


@route("DELETE", "/api/{repo}/tag/{name}")
def delete_tag(hub, request, repo, name):
    hub.writer(request, repo.owner)
    return remove_ref(repo, f"refs/tags/{name}")


def remove_ref(repo: Repo, ref: str) -> dict:
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"There is no {ref}", "RevisionNotFound")
    return {}


# --- discussions and pull requests


@route("GET", "/api/{repo}/discussions")
def list_discussions(hub, request, repo):
    kind, status, author = (request.query.get(name, "all") for name in ("type", "status", "author"))
    rows = []
    for entry in repo.discussions:
        fits_kind = kind == "all" or (kind == "pull_request") == entry.is_pull_request
        fits_status = status in ("all", entry.status if entry.status == "open" else "closed")
        if fits_kind and fits_status and author in ("all", entry.author):
            rows.append(describe_discussion(repo, entry))
    return {"discussions": rows, "count": len(rows), "start": 0}


@route("POST", "/api/{repo}/discussions")
def open_discussion(hub, request, repo):
    asked, user = request.json(), hub.writer(request)
    entry = repo.new_discussion(asked["title"], user, bool(asked.get("pullRequest")))
    return {"num": entry.num, "url": f"{hub.url}/{repo.prefix}{repo.id}/discussions/{entry.num}"}


@route("GET", "/api/{repo}/discussions/{number}")
def show_discussion(hub, request, repo, number):
    entry = find_discussion(repo, number)
    shown = describe_discussion(repo, entry) | {"events": [], "filesWithConflicts": [], "diff": ""}
    changes = {"base": "refs/heads/main", "mergeCommitId": entry.merge_commit}
    return shown | ({"changes": changes} if entry.is_pull_request else {})


@route("POST", "/api/{repo}/discussions/{number}/merge")
def merge_pull_request(hub, request, repo, number):
    """Its files replace those of main, which must not have moved since it was opened."""
    user, entry = hub.writer(request, repo.owner), find_discussion(repo, number)
    head, main = repo.refs.get(f"refs/pr/{number}"), repo.find("main")
    if head is None or entry.status != "open":
        raise HubError(400, f"{number} is not an open pull request")
    if main not in head.history():
        raise HubError(409, "This pull request has conflicts")
    title = f"{entry.title} (#{number})"
    entry.merge_commit = repo.commit("refs/heads/main", head.tree, title, "", user).oid
    entry.status = "merged"
    return {}


def find_discussion(repo: Repo, number: str) -> Discussion:
    for entry in repo.discussions:
        if entry.num == int(number):
            return entry
    raise HubError(404, f"There is no discussion {number}")


def describe_discussion(repo: Repo, entry: Discussion) -> dict:
    shown = {"num": entry.num, "title": entry.title, "author": {"name": entry.author}, "status": entry.status}
    shown |= {"isPullRequest": entry.is_pull_request, "createdAt": entry.date}
    return shown | {"repo": {"name": repo.id, "type": repo.kind}}
