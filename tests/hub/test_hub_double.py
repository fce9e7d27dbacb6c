"""The double of the Hub against the clients of the Hub: each understands what the other sends."""

import hashlib
import http.client
import math
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub_clients import FILES, LARGE, make_folder, run_python, statuses, without_attributes
from hub_double import OTHER_TOKEN, READ_ONLY_TOKEN, TOKEN


# --- huggingface_hub


PUSH = """
result["name"] = whoami()["name"]
result["url"] = str(api.create_repo("alice/model", private=True))
result["again"] = fails(api.create_repo, "alice/model")
result["exist_ok"] = str(api.create_repo("alice/model", exist_ok=True))
result["foreign"] = fails(api.create_repo, "bob/model")
result["first"] = api.upload_folder(repo_id="alice/model", folder_path="up").oid
result["unchanged"] = api.upload_folder(repo_id="alice/model", folder_path="up").oid
api.upload_folder(repo_id="alice/model", folder_path="ignoring", path_in_repo="", commit_message="ignoring")
result["snapshot"] = snapshot_download("alice/model")
rows = api.list_repo_tree("alice/model", recursive=True, expand=True)
result["tree"] = {row.path: row.last_commit.title for row in rows}
result["sub"] = [row.path for row in api.list_repo_tree("alice/model", "sub")]
result["paths"] = [row.path for row in api.get_paths_info("alice/model", ["sub", "config.json", "missing"])]
info = api.model_info("alice/model", files_metadata=True)
result["info"] = [info.sha, info.private, info.tags, info.library_name, info.card_data.license]
result["siblings"] = {row.rfilename: [row.size, row.lfs and row.lfs.sha256] for row in info.siblings}
result["missing"] = [fails(hf_hub_download, "alice/model", "missing"), fails(api.model_info, "alice/nothing"),
                     fails(api.model_info, "alice/model", revision="nothing")]
result["exists"] = [api.file_exists("alice/model", "config.json"), api.file_exists("alice/model", "missing")]
"""


def test_push_and_pull(hub, tmp_path):
    hub.multipart_size, hub.chunk_size, hub.page_size = 1000, 2000, 2
    make_folder(tmp_path / "up")
    make_folder(tmp_path / "ignoring", {".gitignore": b"*.log\n/build/\n", "x.log": b"", "build/y": b"", "z": b""})
    got = run_python(hub, tmp_path, PUSH)
    assert got["name"] == "alice" and got["url"] == got["exist_ok"] == f"{hub.url}/alice/model"
    assert got["again"] == "HfHubHTTPError 409" and got["foreign"] == "HfHubHTTPError 403"

    assert without_attributes(hub.files("alice/model")) == FILES | {".gitignore": b"*.log\n/build/\n", "z": b""}
    head, first, initial = hub.commits("alice/model")
    assert (
        got["first"] == got["unchanged"] == first.oid
        and without_attributes(hub.files("alice/model", first.oid)) == FILES
    )
    assert statuses(hub, r"PUT /upload/\w+/\d") == [200] * 3  # 5000 bytes in parts of 2000
    assert statuses(hub, "POST /api/complete-multipart") == [200]

    snapshot = Path(got["snapshot"])
    pulled = {
        path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()
    }
    assert pulled == hub.files("alice/model")
    assert statuses(hub, "GET /lfs/") == [200]  # its content came from the CDN, which took no token
    assert {path: got["tree"][path] for path in (".gitattributes", "sub", "sub/\u00e9 x.txt", "z")} == {
        ".gitattributes": initial.title,
        "sub": first.title,
        "sub/\u00e9 x.txt": first.title,
        "z": head.title,
    }
    assert got["sub"] == ["sub/\u00e9 x.txt"] and sorted(got["paths"]) == ["config.json", "sub"]
    assert got["info"] == [head.oid, True, ["transformers", "tiny", "license:mit"], "transformers", "mit"]
    assert {path: size for path, (size, _) in got["siblings"].items()} == {
        path: len(data) for path, data in hub.files("alice/model").items()
    }
    assert [path for path, (_, sha256) in got["siblings"].items() if sha256] == ["model.safetensors"]
    assert got["missing"] == [
        "RemoteEntryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RevisionNotFoundError 404",
    ]
    assert got["exists"] == [True, False] and not hub.unknown


REVISIONS = """
first = api.create_commit("alice/model", [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("old/b.bin", b"b")],
                          commit_message="first", commit_description="why").oid
api.create_branch("alice/model", branch="dev/x")
api.create_tag("alice/model", tag="v1")
result["twice"] = [fails(api.create_branch, "alice/model", branch="dev/x"),
                   fails(api.create_tag, "alice/model", tag="v1")]
api.create_commit("alice/model", [CommitOperationDelete("old/"), CommitOperationAdd("c.txt", b"c")],
                  commit_message="second", parent_commit=first)
stale = [CommitOperationAdd("c.txt", b"stale"), CommitOperationDelete("a.txt")]
result["stale"] = fails(api.create_commit, "alice/model", stale, commit_message="stale", parent_commit=first)
half = [CommitOperationAdd("d.txt", b"d"), CommitOperationDelete("missing.txt")]
result["half"] = fails(api.create_commit, "alice/model", half, commit_message="half")
api.upload_file(path_or_fileobj=b"dev", path_in_repo="a.txt", repo_id="alice/model", revision="dev/x")
result["copy"] = api.create_commit("alice/model", [CommitOperationCopy("old/b.bin", "copy.bin", src_revision="v1")],
                                   commit_message="copy").oid
request = api.upload_file(path_or_fileobj=b"pr", path_in_repo="p.txt", repo_id="alice/model", create_pr=True)
result["pr"] = [request.pr_num, request.pr_revision, request.pr_url]
api.upload_file(path_or_fileobj=b"more", path_in_repo="q.txt", repo_id="alice/model", revision="refs/pr/1")
result["files"] = {revision: sorted(api.list_repo_files("alice/model", revision=revision))
                   for revision in ("main", "v1", "dev/x", "refs/pr/1", first[:8])}
refs = api.list_repo_refs("alice/model", include_pull_requests=True)
result["refs"] = [[ref.name for ref in group] for group in (refs.branches, refs.tags, refs.pull_requests)]
rows = api.list_repo_commits("alice/model", revision="v1")
result["commits"] = [[row.title, row.message, row.authors] for row in rows]
rows = api.get_repo_discussions("alice/model")
result["discussions"] = [[row.num, row.is_pull_request, row.author] for row in rows]
result["pull"] = open(hf_hub_download("alice/model", "q.txt", revision="refs/pr/1")).read()
api.merge_pull_request("alice/model", 1)
result["status"] = api.get_discussion_details("alice/model", 1).status
api.delete_branch("alice/model", branch="dev/x")
api.delete_tag("alice/model", tag="v1")
result["gone"] = [fails(api.list_repo_files, "alice/model", revision=revision) for revision in ("dev/x", "v1")]
api.update_repo_settings("alice/model", private=True)
result["private"] = api.model_info("alice/model").private
api.create_repo("alice/data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="d.json", repo_id="alice/data", repo_type="dataset")
result["dataset"] = api.dataset_info("alice/data").id
api.create_repo("alice/space", repo_type="space", space_sdk="gradio")
result["space"] = api.space_info("alice/space").sdk
api.delete_repo("alice/data", repo_type="dataset")
result["deleted"] = fails(api.delete_repo, "alice/data", repo_type="dataset")
"""


def test_commits_and_references(hub, tmp_path):
    hub.create("alice/model")
    got = run_python(hub, tmp_path, REVISIONS)
    assert got["twice"] == ["HfHubHTTPError 409"] * 2
    assert got["stale"] == "HfHubHTTPError 412" and got["half"] == "RemoteEntryNotFoundError 404"
    base = [".gitattributes", "a.txt"]
    assert got["files"] == {
        "main": [*base, "c.txt", "copy.bin"],
        "v1": [*base, "old/b.bin"],
        "dev/x": [*base, "old/b.bin"],
        "refs/pr/1": [*base, "c.txt", "copy.bin", "p.txt", "q.txt"],
        hub.commits("alice/model")[-2].oid[:8]: [*base, "old/b.bin"],
    }
    assert got["pr"] == [1, "refs/pr/1", f"{hub.url}/alice/model/discussions/1"]
    assert got["refs"] == [["main", "dev/x"], ["v1"], ["refs/pr/1"]]
    assert got["commits"] == [["first", "why", ["alice"]], ["initial commit", "", ["alice"]]]
    assert got["discussions"] == [[1, True, "alice"]] and got["pull"] == "more" and got["status"] == "merged"
    assert hub.files("alice/model")["q.txt"] == b"more" and hub.files("alice/model")["copy.bin"] == b"b"
    assert got["gone"] == ["RevisionNotFoundError 404"] * 2
    assert got["private"] and got["dataset"] == "alice/data" and got["space"] == "gradio"
    assert got["deleted"] == "RepositoryNotFoundError 404" and set(hub.repos) == {
        ("model", "alice/model"),
        ("space", "alice/space"),
    }
    assert not hub.unknown


ACCESS = """
for id in ("alice/open", "alice/private", "alice/gated"):
    result[id] = [fails(hf_hub_download, id, "config.json"), fails(api.model_info, id), fails(auth_check, id)]
    result[id] += [fails(api.upload_file, path_or_fileobj=b"new", path_in_repo="config.json", repo_id=id)]
result["whoami"] = fails(whoami)
result["create"] = fails(api.create_repo, "new")
result["listed"] = sorted(row.id for row in api.list_models(author="alice"))
result["pr"] = fails(api.upload_file, path_or_fileobj=b"new", path_in_repo="config.json", repo_id="alice/open",
                     create_pr=True)
"""
MISSING, GATED, DENIED = "RepositoryNotFoundError", "GatedRepoError", "HfHubHTTPError"


def test_who_may_do_what(hub, tmp_path):
    for name in ("open", "private", "gated"):
        hub.create(f"alice/{name}", {"config.json": b"{}"}, private=name == "private", gated=name == "gated" and "auto")
    before = {repo.id: hub.commits(repo.id)[0] for repo in hub.repos.values()}
    reader = run_python(hub, tmp_path / "reader", ACCESS, READ_ONLY_TOKEN)
    stranger = run_python(hub, tmp_path / "stranger", ACCESS, OTHER_TOKEN)
    nobody = run_python(hub, tmp_path / "nobody", ACCESS, token=None)
    assert {repo.id: hub.commits(repo.id)[0] for repo in hub.repos.values() if repo.owner == "alice"} == before

    seen = [None] * 3
    assert reader["alice/open"] == reader["alice/private"] == reader["alice/gated"] == [*seen, f"{DENIED} 403"]
    assert reader["listed"] == ["alice/gated", "alice/open", "alice/private"]
    assert reader["whoami"] is None and reader["create"] == reader["pr"] == f"{DENIED} 403"

    assert stranger["alice/open"] == [*seen, f"{DENIED} 403"]
    assert stranger["alice/private"] == [f"{MISSING} 404"] * 4
    assert stranger["alice/gated"] == [f"{GATED} 403", None, f"{GATED} 403", f"{DENIED} 403"]
    assert stranger["pr"] is None and hub.files("alice/open", "refs/pr/1")["config.json"] == b"new"
    assert stranger["create"] is None and ("model", "bob/new") in hub.repos

    assert nobody["alice/open"][:3] == seen and nobody["alice/private"][:2] == [f"{MISSING} 401"] * 2
    assert nobody["alice/gated"][0] == f"{GATED} 401" and nobody["listed"] == ["alice/gated", "alice/open"]
    assert "401" in nobody["create"] and nobody["alice/open"][3] and nobody["whoami"]


def test_bytes_on_the_wire(hub):
    """What a client could not tell: the headers, the ranges, one connection for many requests, both origins."""
    hub.create("alice/model", FILES)
    head = hub.commits("alice/model")[0]
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)

    def ask(method, target, connection=connection, body=None, **headers):
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    file = "/alice/model/resolve/main/sub/%C3%A9%20x.txt"
    status, body, headers = ask("GET", file)
    socket = connection.sock
    assert (status, body, headers["x-repo-commit"]) == (200, b"text\n" * 9, head.oid)
    status, body, headers = ask("HEAD", file)
    assert (status, body, headers["content-length"]) == (200, b"", "45")
    git_blob = hashlib.sha1(b"blob 45\0" + b"text\n" * 9).hexdigest()
    assert headers["etag"] == f'"{git_blob}"'
    for asked, expected, shown in (("0-0", b"t", "0-0"), ("40-", b"text\n", "40-44"), ("-2", b"t\n", "43-44")):
        status, body, headers = ask("GET", file, range=f"bytes={asked}")
        assert (status, body, headers["content-range"]) == (206, expected, f"bytes {shown}/45")
    assert ask("GET", file, range="bytes=45-")[0] == 416
    assert ask("GET", "/alice/model/resolve/main/missing")[2]["x-repo-commit"] == head.oid
    assert ask("GET", file, authorization="Bearer wrong")[0] == 401
    assert ask("GET", "/nowhere")[0] == 404 and hub.unknown == ["GET /nowhere"]

    status, _, headers = ask("GET", "/alice/model/resolve/main/model.safetensors")
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert status == 302 and headers["x-linked-etag"] == f'"{sha256}"' and headers["x-linked-size"] == "5000"
    assert b"oid sha256:" + sha256.encode() in ask("GET", "/alice/model/raw/main/model.safetensors")[1]
    location = urlsplit(headers["location"])
    assert f"http://{location.netloc}" == hub.cdn_url != hub.url
    cdn = http.client.HTTPConnection(location.netloc)
    assert ask("GET", location.path, cdn)[1] == LARGE
    assert ask("GET", location.path, cdn, range="bytes=4990-")[1] == LARGE[-10:]
    assert ask("GET", location.path, cdn, authorization=f"Bearer {TOKEN}")[0] == 400
    assert ask("PUT", "/upload/0123", cdn, body=b"x")[0] == 403  # nobody permitted it
    assert connection.sock is socket, "a new connection was made"
    hub.stop()
    with pytest.raises(OSError):
        ask("GET", file)


# --- faults


FAULTS = """
import time
time.sleep = lambda seconds: None  # the pauses between a client's attempts
def push(path, data, **keywords):
    return fails(api.upload_file, path_or_fileobj=data, path_in_repo=path, repo_id="alice/model", **keywords)
large = bytes(range(250)) * 20
"""


def test_faults_change_nothing(hub, tmp_path):
    hub.create("alice/model", {"config.json": b"{}"})
    before, folder = hub.commits("alice/model"), tmp_path
    commit = "POST .*/commit/main"
    hub.fail(commit)
    hub.fail(commit, status=507, message="Storage is full")
    hub.fail(commit, status=403, message="Private repository storage limit reached")
    hub.cut(commit, after_bytes=50)
    hub.cut(commit)
    got = run_python(hub, folder, f'{FAULTS}result["failed"] = [push("config.json", b"new") for _ in range(5)]')
    assert statuses(hub, commit) == [500, 507, 403, 0, 0] and hub.commits("alice/model") == before
    assert got["failed"][:3] == [f"HfHubHTTPError {status}" for status in (500, 507, 403)]
    assert all(re.match(r"(Read|Write|RemoteProtocol)Error", error) for error in got["failed"][3:])

    # an upload that breaks for good leaves nothing either, and one that breaks for a while is repeated
    hub.requests.clear()
    hub.cut("PUT /upload/", after_bytes=2000, times=math.inf)
    got = run_python(hub, folder, f'{FAULTS}result["failed"] = push("w.bin", large)')
    assert got["failed"] and set(statuses(hub, "PUT /upload/")) == {0} and not hub.blobs
    assert statuses(hub, commit) == [] and hub.commits("alice/model") == before
    hub.faults.clear()
    hub.requests.clear()
    hub.cut("PUT /upload/", after_bytes=2000, times=2)
    hub.fail("PUT /upload/")
    hub.cut("GET /lfs/", after_bytes=2000)
    code = f"""{FAULTS}
result["pushed"] = push("w.bin", large)
result["same"] = open(hf_hub_download("alice/model", "w.bin"), "rb").read() == large"""
    got = run_python(hub, folder, code)
    assert got == {"pushed": None, "same": True}
    assert statuses(hub, "PUT /upload/") == [0, 0, 500, 200]
    assert statuses(hub, "GET /lfs/") == [0, 200]  # less than the client writes at a time: nothing to resume from


def test_answer_that_is_lost(hub, tmp_path):
    """The one cut after which the commit is there though the client was told nothing."""
    hub.create("alice/model")
    hub.cut("POST .*/commit/main", after_bytes=5, of_answer=True)
    got = run_python(hub, tmp_path, f'{FAULTS}result["failed"] = push("config.json", b"new")')
    assert "Error" in got["failed"] and hub.files("alice/model")["config.json"] == b"new"
