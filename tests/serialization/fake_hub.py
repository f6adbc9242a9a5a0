"""A Hub on this machine, for the real client: repositories in memory, spoken to over HTTP, failing when told to."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USERS = {"hf_owner": "owner", "hf_guest": "guest", "hf_paper": "grafting"}


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref, files):
        oid = hashlib.sha1(f"{ref}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid

    def resolve(self, revision):
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """The next `times` requests of a method to a path fail: with a status, or by closing after so many bytes."""

    method: str
    path: str
    status: int | None = None
    after: int | None = None
    times: int = 1


class FakeHub:
    """With `lfs` every file of 1 KiB or more goes the way of large files."""

    def __init__(self, lfs=False):
        self.lfs, self.repos, self.objects, self.faults, self.requests = lfs, {}, {}, [], []
        self.metadata_errors = []  # what the check of a card's front matter says
        self.pages = {}  # answers of a proxy, HTML or JSON, by method and pattern of the path
        self.on_request = lambda method, path: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method, path, status=None, *, after=None, times=1):
        self.faults.append(Fault(method, path, status, after, times))

    def fault(self, method, path):
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class _RefusedError(Exception):
    def __init__(self, status, code=None, commit=None):
        self.status, self.code, self.commit = status, code, commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", headers=None):
        body = json.dumps(body).encode() if not isinstance(body, bytes) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self.rfile.read(length)
            if length
            else self.chunks()
            if "chunked" in (self.headers.get("Transfer-Encoding") or "")
            else b""
        )
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.on_request(self.command, path)
        self.fault = self.hub.fault(self.command, path)
        for (method, pattern), page in self.hub.pages.items():
            if method == self.command and re.search(pattern, path):
                return self.answer(200, page)
        self.user = USERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        try:
            if self.fault and self.fault.status:
                raise _RefusedError(self.fault.status)
            for (method, pattern), route in ROUTES.items():
                match = re.fullmatch(pattern, path)
                if match and (method == self.command or (method == "GET" and self.command == "HEAD")):
                    return route(self, *match.groups())
            raise _RefusedError(404)
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            headers |= {"X-Repo-Commit": refused.commit} if refused.commit else {}
            return self.answer(refused.status, {"error": f"refused with {refused.status}"}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815 (the names http.server looks for)

    def chunks(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def repo(self, repo_id, *, write=False):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.partition("/")[0]):
            raise _RefusedError(401 if self.user is None else 404, "RepoNotFound")
        if write and self.user is None:
            raise _RefusedError(401)
        if write and self.user != repo_id.partition("/")[0]:
            raise _RefusedError(403)
        return repo

    def commit_of(self, repo, revision):
        oid = repo.resolve(revision)
        if oid is None:
            raise _RefusedError(404, "RevisionNotFound")
        return oid

    def whoami(self):
        if self.user is None:
            raise _RefusedError(401)
        self.answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        if self.user is None:
            raise _RefusedError(401)
        data = json.loads(self.body)
        owner = data.get("organization") or self.user
        if owner != self.user:
            raise _RefusedError(403)
        repo_id = f"{owner}/{data['name']}"
        known = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(409, known)
        repo = self.hub.repos[repo_id] = Repository(
            private=bool(data.get("private")) or data.get("visibility") == "private"
        )
        repo.commit("main", {".gitattributes": b""})
        return self.answer(200, known)

    def delete(self):
        data = json.loads(self.body)
        self.hub.repos.pop(f"{data.get('organization') or self.user}/{data['name']}")
        self.answer(200, {})

    def validate(self):
        errors = [{"message": message} for message in self.hub.metadata_errors]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo_id, revision):
        self.repo(repo_id, write="create_pr" not in self.query)
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "oid": None,
                "uploadMode": "lfs" if self.hub.lfs and file["size"] >= 1024 else "regular",
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, repo_id):
        self.repo(repo_id, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            href = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
            needed = {} if item["oid"] in self.hub.objects else {"actions": {"upload": href, "verify": href}}
            objects.append({**item, **needed})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400)
        self.hub.objects[oid] = self.body
        self.answer(200)

    def verify(self, oid):
        self.answer(200 if oid in self.hub.objects else 404, {})

    def commit(self, repo_id, revision):
        request = "1" in self.query.get("create_pr", [])
        repo = self.repo(repo_id, write=not request)
        parent = self.commit_of(repo, revision)
        files = dict(repo.commits[parent])
        for row in map(json.loads, self.body.splitlines()):
            value = row["value"]
            if row["key"] == "header" and value.get("parentCommit") not in (None, parent):
                raise _RefusedError(412)
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(f"refs/pr/{number}" if request else revision, files)
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
            "hookOutput": "",
        }
        if request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        self.answer(200, answer)

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": name} for name in repo.commits[oid]]
        self.answer(
            200,
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "siblings": siblings,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "author": repo_id.partition("/")[0],
            },
        )

    def search(self):
        """List the models whose cards have every tag that is asked for; a base and a license are tags, too."""
        found = []
        for repo_id, repo in self.hub.repos.items():
            card = repo.commits[repo.refs["main"]].get("README.md", b"").decode()
            data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
            tags = [*data.get("tags", []), data.get("library_name"), f"base_model:{data.get('base_model')}"]
            if not repo.private and set(self.query.get("filter", [])) <= set(tags):
                found.append({"id": repo_id, "sha": repo.refs["main"], "downloads": 7, "tags": tags, "cardData": data})
        self.answer(200, found)

    def tree(self, repo_id, revision):
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        rows = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        self.answer(200, rows)

    def resolve(self, repo_id, revision, name):
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        if name not in repo.commits[oid]:
            raise _RefusedError(404, "EntryNotFound", oid)
        data = repo.commits[oid][name]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.fault and self.fault.after is not None and self.command == "GET":
            self.send_response(206 if start else 200)
            for header, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data[start : start + self.fault.after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.answer(206 if start else 200, data[start:], headers)


REPO, REVISION = r"([^/]+/[^/]+)", r"(refs/pr/\d+|[^/]+)"
ROUTES = {
    ("GET", "/api/whoami-v2"): _Handler.whoami,
    ("POST", "/api/repos/create"): _Handler.create,
    ("DELETE", "/api/repos/delete"): _Handler.delete,
    ("POST", "/api/validate-yaml"): _Handler.validate,
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}"): _Handler.preupload,
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"): _Handler.batch,
    ("PUT", r"/lfs/(\w+)"): _Handler.put,
    ("POST", r"/lfs/(\w+)"): _Handler.verify,
    ("POST", f"/api/models/{REPO}/commit/{REVISION}"): _Handler.commit,
    ("GET", f"/api/models/{REPO}/tree/{REVISION}"): _Handler.tree,
    ("GET", f"/api/models/{REPO}/revision/{REVISION}"): _Handler.info,
    ("GET", f"/api/models/{REPO}"): _Handler.info,
    ("GET", "/api/models"): _Handler.search,
    ("GET", f"/{REPO}/resolve/{REVISION}/(.+)"): _Handler.resolve,
}
