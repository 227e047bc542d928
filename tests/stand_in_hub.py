"""A Hub in a thread: repositories with commits, tokens and large files, over real HTTP, and faults that can be ordered.

Large files lie on a second server, as on the Hub, so that a token sent to where it does not belong is seen.
"""

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# token: owner of the repositories it may read, and whether it may write them
TOKENS = {
    "hf_writer_Kq7ZtV2w": ("user", True),
    "hf_reader_Xm4RbN9e": ("user", False),
    "hf_other_Lp3WcJ6h": ("other", True),
}
WRITER, READER, OTHER = TOKENS


def oid_of(content, large):
    """What names a content: sha256 of a large file, git's sha1 of a small one."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".bin", ".pt"))


@dataclass
class Repo:
    """Commits by hash: files, parent, message. Branches and pull requests are names for hashes."""

    private: bool = False
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)

    def commit(self, ref, files, message):
        parent = self.refs.get(ref)
        sha = hashlib.sha1(f"{parent}{message}{secrets.token_hex(8)}".encode()).hexdigest()
        self.commits[sha] = SimpleNamespace(files=dict(files), parent=parent, message=message)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision):
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What to do with some of the requests whose line `METHOD path` matches: those after `skip`, at most `times`.

    `kind` is "status", "cut" (no answer, no effect), "lost" (effect, no answer), "truncate", "garble" or "act" (first do
    something, then all as usual).
    """

    pattern: str
    kind: str
    status: int = 500
    skip: int = 0
    times: int | None = None
    headers: dict = field(default_factory=dict)
    action: object = None

    def strikes(self, line):
        if not re.search(self.pattern, line):
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times == 0:
            return False
        self.times = None if self.times is None else self.times - 1
        return True


class Stop(Exception):
    """An answer that is no success."""

    def __init__(self, status, code=None, message="", **headers):
        self.status, self.body = status, {"error": message}
        self.headers = headers | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class StandInHub:
    """`with StandInHub() as hub:` serves at `hub.url`; `connect` points huggingface_hub and transformers to it."""

    def __init__(self):
        self.repos, self.large, self.faults, self.requests, self.tokens_seen, self.broken = {}, {}, [], [], [], []
        self.lock = threading.RLock()

    def __enter__(self):
        self._servers = []
        for name in ("api", "storage"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self, "place": name}))
            server.daemon_threads, server.handle_error = True, self.note
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *error):
        for server in self._servers:
            server.shutdown()
            server.server_close()
        assert not self.broken, self.broken

    def note(self, *_):
        """A connection may break; the Hub itself must not, or a test of failures would pass for that."""
        if not isinstance(sys.exception(), ConnectionError):
            self.broken.append(traceback.format_exc())

    def connect(self, monkeypatch, folder):
        """Point the libraries of this process here, with an empty cache in `folder` and no token of the machine's."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _http, close_session

        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        settings = {"ENDPOINT": self.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings |= {"HF_HUB_CACHE": str(folder / "cache"), "HF_TOKEN_PATH": str(folder / "token")}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        # Made once per process, for the endpoint of that moment.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        self.waits = []  # seconds that the client would have slept between its tries
        clock = SimpleNamespace(**vars(_http.time) | {"sleep": self.waits.append})
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr("huggingface_hub.file_download.time", clock)
        close_session()

    def environment(self, folder):
        """The same for another process."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        return switches | {"HF_ENDPOINT": self.url, "HF_HOME": str(folder)}

    # Seen and changed from outside of HTTP ------------------------------------------------------------------------------

    def write(self, repo_id, files, private=False, ref="main", message="written by hand"):
        """A commit with these files and no others; returns its hash."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private))
            return repo.commit(ref, {path: bytes(content) for path, content in files.items()}, message)

    def head(self, repo_id, ref="main"):
        return self.repos[repo_id].refs.get(ref)

    def files(self, repo_id, revision="main"):
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)].files

    def fault(self, pattern, kind="status", **options):
        self.faults.append(Fault(pattern, kind, **options))

    # Requests -----------------------------------------------------------------------------------------------------------

    def user(self, token):
        if token is None:
            return None, False
        if token not in TOKENS:
            raise Stop(401, message="Invalid credentials in Authorization header")
        return TOKENS[token]

    def open(self, repo_id, token, write=False):
        """The repository, if the token may see it and, to write, change it."""
        user, may_write = self.user(token)
        repo = self.repos.get(repo_id)
        own = user == repo_id.split("/")[0]
        if repo is None or (repo.private and not own):
            raise Stop(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (own and may_write):
            raise Stop(403 if user else 401, message="you don't have the required permissions to write")
        return repo

    def commit_of(self, repo, revision):
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise Stop(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def answer(self, method, path, query, token, body):
        """Status, headers and body of a request to the Hub itself."""
        if path == "/api/repos/create":
            return self.create(token, json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            repo_id, rest = found.groups()
            action, _, argument = (rest or "revision/main").partition("/")
            if action in ("revision", "tree", "auth-check", "branch", "preupload", "commit"):
                return getattr(self, "api_" + action.replace("-", "_"))(repo_id, argument, query, token, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return getattr(self, "lfs_" + found[2])(found[1], token, json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[2], unquote(found[3]), token)
        raise Stop(404, message="no such page")

    def create(self, token, wanted):
        user, may_write = self.user(token)
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        if user is None:
            raise Stop(401, message="Invalid username or password.")
        if user != owner or not may_write:
            raise Stop(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        known = repo_id in self.repos
        if not known:
            self.write(
                repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, wanted.get("visibility") == "private"
            )
        return 409 if known else 200, {}, {"url": f"{self.url}/{repo_id}", "name": repo_id}

    def validate(self, content):
        block = re.match(r"---\r?\n(.*?)\r?\n---", content, re.S)
        try:
            data = yaml.safe_load(block[1]) if block else {}
            licence = data.get("license") if isinstance(data, dict) else data
            errors = [] if licence is None or isinstance(licence, str) else ['"license" must be a string']
        except yaml.YAMLError as error:
            errors = [str(error)]
        return 400 if errors else 200, {}, {"errors": [{"message": text} for text in errors], "warnings": []}

    def api_revision(self, repo_id, revision, query, token, body):
        repo = self.open(repo_id, token)
        sha, commit = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return 200, {}, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def api_tree(self, repo_id, argument, query, token, body):
        revision, _, folder = argument.partition("/")
        sha, commit = self.commit_of(self.open(repo_id, token), revision)
        entries = []
        for path, content in sorted(commit.files.items()):
            if path.startswith(f"{unquote(folder)}/" if folder else ""):
                large = {"lfs": {"oid": oid_of(content, True), "size": len(content), "pointerSize": 134}}
                entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(content, False)}
                entries.append(entry | (large if is_large(path) else {}))
        if folder and not entries:
            raise Stop(404, "EntryNotFound", f"{folder} does not exist", **{"X-Repo-Commit": sha})
        return 200, {}, entries

    def api_auth_check(self, repo_id, argument, query, token, body):
        self.open(repo_id, token, write=argument == "write")
        return 200, {}, {}

    def api_branch(self, repo_id, branch, query, token, body):
        repo, name = self.open(repo_id, token, write=True), unquote(branch)
        if name in repo.refs:
            raise Stop(409, message="Reference already exists")
        repo.refs[name], _ = self.commit_of(repo, json.loads(body or b"{}").get("startingPoint", "main"))
        return 200, {}, {}

    def api_preupload(self, repo_id, revision, query, token, body):
        repo = self.open(repo_id, token, write="create_pr" not in query)
        _, commit = self.commit_of(repo, revision)
        files = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            oid = oid_of(commit.files[path], is_large(path)) if path in commit.files else None
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": files}

    def lfs_batch(self, repo_id, token, wanted):
        self.open(repo_id, token)
        verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
        for item in wanted["objects"]:
            if item["oid"] not in self.large:
                upload = {"href": f"{self.storage_url}/lfs/{item['oid']}?signed=1"}
                item["actions"] = {"upload": upload, "verify": verify}
        return 200, {}, {"transfer": "basic", "objects": wanted["objects"]}

    def lfs_verify(self, repo_id, token, wanted):
        self.open(repo_id, token)
        if len(self.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise Stop(404, message="object not uploaded")
        return 200, {}, {}

    def api_commit(self, repo_id, revision, query, token, body):
        pull = "create_pr" in query
        repo, ref = self.open(repo_id, token, write=not pull), unquote(revision)
        sha, commit = self.commit_of(repo, ref)
        header, *operations = (json.loads(line) for line in body.splitlines())
        if not pull and header["value"].get("parentCommit", sha) != sha:
            raise Stop(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(commit.files)
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.large:
                files[path] = self.large[value["oid"]]
            elif operation["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise Stop(400, message=f"cannot do {operation['key']} {path}")
        target = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}" if pull else ref
        repo.refs.setdefault(target, sha)
        new = repo.commit(target, files, header["value"]["summary"])
        discussion = f"{self.url}/{repo_id}/discussions/{target.rpartition('/')[2]}"
        return (
            200,
            {},
            {"commitUrl": f"{self.url}/{repo_id}/commit/{new}", "commitOid": new, "pullRequestUrl": discussion},
        )

    def resolve(self, repo_id, revision, path, token):
        sha, commit = self.commit_of(self.open(repo_id, token), revision)
        if path not in commit.files:
            raise Stop(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        content = commit.files[path]
        if not is_large(path):
            return 200, {"X-Repo-Commit": sha, "ETag": f'"{oid_of(content, False)}"'}, content
        oid = oid_of(content, True)
        self.large[oid] = content
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": sha}
        return 302, linked | {"Location": f"{self.storage_url}/lfs/{oid}?signed=1"}, b""

    def store(self, method, path, body):
        """Status, headers and body of a request to the storage of large files."""
        oid = path.rpartition("/")[2]
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise Stop(400, message="content does not match")
            self.large[oid] = body
            return 200, {}, b""
        if oid not in self.large:
            raise Stop(404, message="no such object")
        return 200, {"ETag": f'"{oid}"'}, self.large[oid]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer's body waits 40 ms for the receipt of its headers
    hub = place = None
    log_message = staticmethod(lambda *_: None)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self):
        method, body = self.command, self.body()
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        line = f"{method} {unquote(url.path)}"
        if url.path == "/api/agent-harnesses":  # asked by chance: once a day
            return self.send_error(404)
        with self.hub.lock:
            self.hub.requests.append(f"{self.place} {line}")
            self.hub.tokens_seen.append((self.place, token))
            fault = next((fault for fault in self.hub.faults if fault.strikes(line)), None)
            kind = fault.kind if fault else None
            if kind == "cut":
                return self.hang_up()
            if kind == "act":
                fault.action()
            try:
                if kind == "status":
                    raise Stop(fault.status, **({"message": "ordered by the test"} | fault.headers))
                if self.place == "storage":
                    status, headers, answer = self.hub.store(method, url.path, body)
                else:
                    query = parse_qs(url.query)
                    status, headers, answer = self.hub.answer(method, url.path, query, token, body)
            except Stop as stop:
                status, headers, answer = stop.status, stop.headers, stop.body
        if kind == "lost":
            return self.hang_up()
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if kind == "garble":
            content = bytes(byte ^ 0x5A for byte in content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and status == 200:
            headers = headers | {"Content-Range": f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"}
            status, content = 206, content[int(wanted[1]) :]
        self.send_response(status)
        types = {} if isinstance(answer, bytes) else {"Content-Type": "application/json"}
        for name, value in (types | headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(content[: len(content) // 2] if kind == "truncate" else content)
        if kind == "truncate":
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
