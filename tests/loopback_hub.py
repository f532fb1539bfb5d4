"""
A Hub on 127.0.0.1 with the parts of the protocol that huggingface_hub uses: repositories, uploads (also LFS), commits, trees, info, and
files by range request. The client is the real one, unmodified; `HubServer.environment` directs it here.
"""

import base64
import collections
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from loopback import FileHandler, FileServer

TOKEN = "hf_loopback-secret"
LFS_PATTERN = re.compile(r"\.(safetensors|mp4|tar|png)$")


@dataclass(frozen=True)
class Blob:
    """A stored file: its git object id, its sha256 if it is an LFS file, and the path of its bytes."""

    git_oid: str
    sha256: str | None
    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_oid


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    kind: str
    name: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)

    def commit(self, message: str, files: dict[str, Blob]) -> Commit:
        stamp = json.dumps([self.name, len(self.commits), message, sorted((k, b.etag) for k, b in files.items())])
        self.commits.append(Commit(hashlib.sha1(stamp.encode()).hexdigest(), message, files))
        return self.commits[-1]


class HubServer(FileServer):
    """
    The server, with `repositories` by (kind, name).

    A fault is [pattern of "METHOD path", outcome, number of times]. The outcome is a status, "drop", which closes the connection without an
    answer, or "truncate", which announces the whole body and sends half of it. `writers` are the namespaces that the token may write to.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, HubHandler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[list] = []
        self.writers = {"org"}
        self.received = collections.Counter()  # bytes by (method, path)

    def fail(self, pattern: str, outcome: int | str, times: int = 10**6) -> None:
        self.faults.append([re.compile(pattern), outcome, times])

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a subprocess that uses this Hub, with a cache of its own in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and k != "PYTHONPATH"}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        kept |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        return kept if token is None else {**kept, "HF_TOKEN": token}

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def store(self, data: bytes, lfs: bool) -> Blob:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.folder / sha256
        if not path.exists():
            # Written to another file and renamed, because several requests may store the same bytes at once.
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(data)
            os.replace(file.name, path)
        return Blob(git, sha256 if lfs else None, path)

    def add_dataset(self, name: str, files: dict[str, bytes], kind: str = "dataset") -> Commit:
        """Create a data set (or model) repository with these files, or add them to it by one more commit."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        before = repository.commits[-1].files if repository.commits else {}
        new = {path: self.store(data, bool(LFS_PATTERN.search(path))) for path, data in files.items()}
        return repository.commit("files", {**before, **new})


class HubHandler(FileHandler):
    server: HubServer

    def do_POST(self):
        self.dispatch()

    def do_PUT(self):
        self.dispatch()

    def answer(self, body: bool) -> None:
        self.dispatch()

    def dispatch(self) -> None:
        split = urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        for fault in self.server.faults:
            if fault[2] > 0 and fault[0].search(f"{self.command} {path}"):
                fault[2] -= 1
                if fault[1] == "drop":
                    self.close_connection = True
                    return
                if fault[1] == "truncate":
                    self.server.drop = 1  # read by FileHandler.reply
                    break
                self.body()
                self.error(fault[1], f"injected {fault[1]}", **({"Retry-After": "0"} if fault[1] == 429 else {}))
                return
        data = self.body()
        for method, pattern, act in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                act(self, data, *match.groups())
                return
        self.error(404, f"this loopback Hub does not know {self.command} {path}")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received[self.command, urlsplit(self.path).path] += len(data)
        return data

    def json(self, value, status: int = 200, **headers: str) -> None:
        headers = {"Content-Type": "application/json", **headers}
        self.reply(status, json.dumps(value).encode(), self.command != "HEAD", **headers)

    def error(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.json({"error": message}, status, **headers)

    def token_of(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may_write(self, name: str) -> bool:
        """Return whether the request may write; if not, the Hub's error has been sent."""
        if self.token_of() != TOKEN:
            self.error(401, "Invalid credentials in Authorization header")
        elif name.split("/")[0] not in self.server.writers:
            self.error(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
        else:
            return True
        return False

    def find(self, kind: str, name: str, revision: str = "main") -> tuple[Repository, Commit] | None:
        repository = self.server.repositories.get((kind, name))
        if repository is None or (repository.private and self.token_of() != TOKEN):
            self.error(401 if self.token_of() is None else 404, "Repository not found", "RepoNotFound")
        elif (commit := repository.find(unquote(revision))) is None:
            self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            return repository, commit
        return None

    # --- repositories and uploads ---

    def create(self, data: bytes) -> None:
        wanted = json.loads(data)
        kind, name = wanted.get("type", "model"), f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        if not self.may_write(name):
            return
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.server.repositories:
            self.json({"error": "You already created this repo", "url": url}, 409)
            return
        repository = Repository(kind, name, private=wanted.get("visibility") == "private")
        repository.commit(
            "initial commit", {".gitattributes": self.server.store(b"*.safetensors filter=lfs\n", False)}
        )
        self.server.repositories[kind, name] = repository
        self.json({"url": url, "name": name, "id": name})

    def validate_yaml(self, data: bytes) -> None:
        content = json.loads(data)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError as error:
            self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.json({"errors": [], "warnings": warnings})

    def preupload(self, data: bytes, kind: str, name: str, revision: str) -> None:
        found = self.may_write(name) and self.find(kind, name, revision)
        if not found:
            return
        files, before = [], found[1].files
        for file in json.loads(data)["files"]:
            lfs = bool(LFS_PATTERN.search(file["path"]))
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append({**entry, "oid": before[file["path"]].etag if file["path"] in before else None})
        self.json({"files": files})

    def lfs_batch(self, data: bytes, prefix: str, name: str) -> None:
        objects = []
        for wanted in json.loads(data)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.server.folder / wanted["oid"]).exists():
                href = f"{self.server.url}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self.error(400, "the bytes are not those of the oid")
            return
        self.server.store(data, True)
        self.json({})

    def lfs_verify(self, data: bytes, oid: str) -> None:
        wanted, path = json.loads(data), self.server.folder / oid
        good = path.exists() and path.stat().st_size == wanted["size"]
        self.json({}) if good else self.error(404, "no such object")

    def commit(self, data: bytes, kind: str, name: str, revision: str) -> None:
        found = self.may_write(name) and self.find(kind, name, revision)
        if not found:
            return
        repository, before = found
        header, *operations = [json.loads(line) for line in data.splitlines()]
        files = dict(before.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.store((self.server.folder / value["oid"]).read_bytes(), True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(header["value"]["summary"], files)
        self.json({"commitUrl": f"{self.server.url}/{name}/commit/{made.oid}", "commitOid": made.oid})

    # --- reading ---

    def info(self, data: bytes, kind: str, name: str, revision: str | None = None) -> None:
        if found := self.find(kind, name, revision or "main"):
            repository, commit = found
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            tags = self.card_tags(commit)
            self.json(
                {"id": name, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": tags}
            )

    def card_tags(self, commit: Commit) -> list[str]:
        if "README.md" not in commit.files:
            return []
        front = commit.files["README.md"].path.read_text().split("---\n")[1]
        return (yaml.safe_load(front) or {}).get("tags", [])

    def tree(self, data: bytes, kind: str, name: str, revision: str, folder: str | None) -> None:
        if not (found := self.find(kind, name, revision)):
            return
        inside = f"{folder.strip('/')}/" if folder else ""
        names = [path for path in found[1].files if path.startswith(inside)]
        if inside and not names:
            self.error(404, f"{folder} does not exist", "EntryNotFound")
            return
        folders = {
            str(parent) for path in names for parent in Path(path).parents if str(parent) not in (".", inside[:-1])
        }
        folders = {path for path in folders if path.startswith(inside)}
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            names = [path for path in names if "/" not in path.removeprefix(inside)]
            folders = {path for path in folders if "/" not in path.removeprefix(inside)}
        self.json([self.entry(found[1], path) for path in sorted({*names, *folders})])

    def entry(self, commit: Commit, path: str) -> dict:
        if path not in commit.files:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        blob = commit.files[path]
        lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.sha256 else {}
        return {"type": "file", "path": path, "oid": blob.git_oid, "size": blob.size, **lfs}

    def paths_info(self, data: bytes, kind: str, name: str, revision: str) -> None:
        if found := self.find(kind, name, revision):
            wanted = parse_qs(data.decode()) if not data.startswith(b"{") else json.loads(data)
            known = [p for p in wanted["paths"] if any(f == p or f.startswith(f"{p}/") for f in found[1].files)]
            self.json([self.entry(found[1], path) for path in known])

    def resolve(self, data: bytes, prefix: str | None, name: str, revision: str, path: str) -> None:
        found = self.find((prefix or "models/").removesuffix("s/"), name, revision)
        if not found:
            return
        commit = found[1]
        if path not in commit.files:
            self.error(404, f"{path} does not exist on {revision!r}", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
            return
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
        if blob.sha256 is None:
            self.send_file(blob.path, self.command == "GET", **headers)
            return
        # As on the Hub, LFS files lie on another host: the first answer gives their hash, size and location.
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        self.reply(302, b"", False, Location=f"{elsewhere}/cdn/{blob.sha256}", **headers)

    def cdn(self, data: bytes, sha256: str) -> None:
        self.send_file(self.server.folder / sha256, self.command == "GET", ETag=f'"{sha256}"')


_API = r"/api/(model|dataset|space)s/([^/]+/[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", HubHandler.create),
    (("POST",), r"/api/validate-yaml", HubHandler.validate_yaml),
    (("POST",), _API + r"/preupload/([^/]+)", HubHandler.preupload),
    (("POST",), _API + r"/commit/([^/]+)", HubHandler.commit),
    (("POST",), _API + r"/paths-info/([^/]+)", HubHandler.paths_info),
    (("POST",), r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    (("PUT",), r"/lfs/(\w+)", HubHandler.lfs_put),
    (("POST",), r"/lfs/(\w+)/verify", HubHandler.lfs_verify),
    (("GET",), _API + r"/tree/([^/]+)(?:/(.*))?", HubHandler.tree),
    (("GET",), _API + r"(?:/revision/([^/]+))?", HubHandler.info),
    (("GET", "HEAD"), r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubHandler.resolve),
    (("GET", "HEAD"), r"/cdn/(\w+)", HubHandler.cdn),
]


class Interpreter:
    """A Python process that uses `hub` and runs scripts one after the other, so that modules are imported only once."""

    LOOP = """
import gc, os, sys, traceback
scripts, sys.stdin = sys.stdin, open(os.devnull)
for line in scripts:
    path = line.strip()
    os.chdir(os.path.dirname(path))
    try:
        exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__"})
        print(chr(0) + "passed", flush=True)
    except BaseException:
        print(traceback.format_exc() + chr(0) + "failed", flush=True)
gc.freeze()  # or it ends 2 s later
"""

    def __init__(self, hub: HubServer, home: Path, prelude: str = ""):
        self.log = open(home / "stderr.txt", "w")
        command, pipe = [sys.executable, "-u", "-c", prelude + self.LOOP], subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=home, env=hub.environment(home / "hf"), stdin=pipe, stdout=pipe, stderr=self.log, text=True
        )

    def __call__(self, folder: Path, script: str) -> str:
        """
        Run `script` in `folder` and return what it prints.

        Raises:
            AssertionError: the script raised an error, or the process ended.
        """
        (folder / "script.py").write_text(script)
        self.process.stdin.write(f"{folder / 'script.py'}\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if "\0" in line:
                printed, outcome = ("".join(lines) + line).split("\0")
                assert outcome.strip() == "passed", printed
                return printed
            lines.append(line)
        raise AssertionError(f"the process ended: {self.errors()}")

    def errors(self) -> str:
        """Return what the process has written to stderr so far."""
        return Path(self.log.name).read_text()

    def close(self) -> None:
        self.process.stdin.close()  # then it ends by itself, so that its coverage is counted
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
