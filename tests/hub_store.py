"""What a Hub holds and answers, without sockets: repositories, their commits and large files, and who may do what.

As huggingface_hub 2.4 asks it. Models only; left out are Xet storage, pull requests, tags, gated repositories,
`.gitignore` and the redirect of downloads to another host.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml


Json = dict[str, Any]

LARGE_BYTES = 10_000_000
LARGE_NAMES = ("*.bin", "*.safetensors", "*.onnx", "*.pt", "*.pth", "*.npy", "*.npz", "*.zip", "*.gz", "*tfevents*")
GIT_ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE_NAMES).encode()
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


@dataclass
class HubError(Exception):
    """A refusal, as the Hub words it.

    Attributes:
        status (`int`): of HTTP.
        message (`str`)
        code (`str`, *optional*): from which the client picks its exception.
        extra (`dict`): more fields of the JSON that is answered.
    """

    status: int
    message: str
    code: str | None = None
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """A state of a repository, which never changes.

    Attributes:
        sha (`str`): 40 hexadecimal digits.
        parent (`str`, *optional*): sha of the commit before; `None` for the first.
        message (`str`): its first line.
        description (`str`): what follows that line.
        files (`Mapping[str, bytes]`): by path; the Hub's own `.gitattributes` is one of them.
        large (`frozenset[str]`): paths of those in large file storage.
        date (`str`): in UTC.
    """

    sha: str
    parent: str | None
    message: str
    description: str
    files: Mapping[str, bytes]
    large: frozenset[str]
    date: str

    def content_id(self, path: str) -> str:
        """What a client compares its own file with: git's id, or the sha256 of a large file."""
        return sha256(self.files[path]) if path in self.large else git_id(self.files[path])

    def entry(self, path: str) -> Json:
        """A file's line of [`Commit.tree`]."""
        size, oid = len(self.files[path]), self.content_id(path)
        line: Json = {"type": "file", "path": path, "size": size, "oid": oid}
        if path in self.large:
            pointer = POINTER.format(oid, size).encode()
            line |= {"oid": git_id(pointer), "lfs": {"oid": oid, "size": size, "pointerSize": len(pointer)}}
        return line

    def tree(self, folder: str, recursive: bool) -> list[Json]:
        """Files and folders inside a folder, which is empty for all of the repository."""
        prefix = f"{folder}/" if folder else ""
        inside = [path.removeprefix(prefix) for path in sorted(self.files) if path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {self.sha}", "EntryNotFound")
        folders = sorted({"/".join(path.split("/")[:i]) for path in inside for i in range(1, path.count("/") + 1)})
        common: Json = {"type": "directory", "size": 0}
        lines = [common | {"path": prefix + name, "oid": git_id(name.encode())} for name in folders]
        lines += [self.entry(prefix + path) for path in inside]
        return [line for line in lines if recursive or line["path"].count("/") == prefix.count("/")]


class Repository:
    """
    Attributes:
        id (`str`): `user/name`.
        private (`bool`)
        commits (`list[Commit]`): of all branches, in the order they were made; the first one is the Hub's own.
        branches (`dict[str, str]`): sha by name.
        objects (`dict[str, bytes]`): uploaded large files by sha256, committed or not.
    """

    def __init__(self, id: str, private: bool) -> None:
        self.id = id
        self.private = private
        self.commits: list[Commit] = []
        self.branches: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self._parts: dict[tuple[str, int], bytes] = {}
        self._append("main", None, "initial commit", "", {".gitattributes": GIT_ATTRIBUTES}, set())

    @property
    def head(self) -> str:
        """Sha of `main`."""
        return self.branches["main"]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return dict(self.at(revision).files)

    def at(self, revision: str) -> Commit:
        """The commit of a branch or a full sha."""
        sha = self.branches.get(revision, revision)
        found = next((commit for commit in self.commits if commit.sha == sha), None)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, branch: str, header: Json, operations: Iterable[Json]) -> Commit:
        """Applies all operations to a branch, or none.

        Args:
            branch (`str`)
            header (`dict`): `summary`, `description`, perhaps `parentCommit`.
            operations (`Iterable[dict]`): `key` and `value` each, as a client sends them.

        Raises:
            HubError: the branch is not there or has moved, or an operation cannot be done.
        """
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        before = self.at(branch)
        if not before.sha.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files, large = dict(before.files), set(before.large)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files, large)
        return self._append(branch, before.sha, header["summary"], header["description"], files, large)

    def _apply(self, kind: str, value: Json, files: dict[str, bytes], large: set[str]) -> None:
        """One operation, in place."""
        path = value["path"]
        if kind == "deletedFolder":
            gone = {name for name in files if name.startswith(f"{path.rstrip('/')}/")}
        else:
            gone = {path} & files.keys()
        if kind.startswith("deleted") and not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        if kind == "lfsFile" and value["oid"] not in self.objects:
            raise HubError(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist.")
        for name in gone:
            del files[name]
        large -= gone
        if kind == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
        elif kind == "lfsFile":
            files[path] = self.objects[value["oid"]]
            large.add(path)
        elif not kind.startswith("deleted"):
            raise HubError(400, f"Unknown operation: {kind}")

    def _append(
        self, branch: str, parent: str | None, message: str, description: str, files: dict[str, bytes], large: set[str]
    ) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {parent} {message} {date}".encode()).hexdigest()
        commit = Commit(sha, parent, message, description, MappingProxyType(files), frozenset(large), date)
        self.commits.append(commit)
        self.branches[branch] = sha
        return commit

    def preupload(self, branch: str, files: list[Json]) -> list[Json]:
        """For each file that a client wants to commit: the road it has to take, and the id of what is there now."""
        now = self.at(branch)
        rules = now.files.get(".gitattributes", b"").decode().splitlines()
        patterns = [rule.split()[0] for rule in rules if "filter=lfs" in rule]
        answers = []
        for file in files:
            path, sample = file["path"], base64.b64decode(file["sample"])
            named = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
            mode = "lfs" if named or b"\0" in sample or file["size"] > LARGE_BYTES else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in now.files:
                answers[-1]["oid"] = now.content_id(path)
        return answers

    def store(self, oid: str, data: bytes) -> None:
        """Keeps an uploaded large file.

        Raises:
            HubError: it is not the one that was announced.
        """
        if sha256(data) != oid:
            raise HubError(400, "The provided 'x-amz-content-sha256' header does not match what was computed.")
        self.objects[oid] = data

    def store_part(self, oid: str, number: int, data: bytes) -> str:
        """Keeps one part of a large file, and returns its ETag."""
        self._parts[oid, number] = data
        return f'"{sha256(data)}"'

    def join_parts(self, oid: str, parts: list[Json]) -> None:
        """Makes a large file of its parts."""
        found = [self._parts.get((oid, part["partNumber"]), b"") for part in parts]
        if [f'"{sha256(data)}"' for data in found] != [part["etag"] for part in parts]:
            raise HubError(400, "One or more of the specified parts could not be found.")
        self.store(oid, b"".join(found))

    def info(self, revision: str, blobs: bool) -> Json:
        """What the Hub tells of a model, in part taken from its card's metadata."""
        commit, card = self.at(revision), front_matter(self.files().get("README.md", b"").decode())
        siblings: list[Json] = [{"rfilename": path} for path in sorted(commit.files)]
        for file in siblings if blobs else []:
            entry = commit.entry(file["rfilename"])
            file |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                file["lfs"] = {"sha256": entry["lfs"]["oid"], **entry["lfs"]}
        answer = {
            "id": self.id,
            "modelId": self.id,
            "author": self.id.split("/")[0],
            "sha": commit.sha,
            "private": self.private,
            "createdAt": self.commits[0].date,
            "lastModified": commit.date,
            "tags": card.get("tags", []),
            "siblings": siblings,
            "cardData": card,
        }
        return answer | {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}

    def refs(self) -> Json:
        """All branches."""
        rows = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in self.branches.items()
        ]
        return {"branches": rows, "tags": [], "converts": [], "pullRequests": []}


@dataclass
class Exchange:
    """A request, names of headers in small letters, and the status of the answer: 0 until one has been sent whole."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytearray = field(default_factory=bytearray)
    status: int = 0

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(self.path.partition("?")[2]).items()}

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    content: Any = None  # bytes, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class Hub:
    """A Hub with one account.

    Attributes:
        url (`str`): where it is reached.
        repos (`dict[str, Repository]`): by `user/name`; may be written, too.

    Args:
        token (`str`): the only one that is let in.
        user (`str`): its owner, who may write below `user/` and nowhere else.
        read_only (`bool`): the token may not write.
        part_bytes (`int`): large files above this size are uploaded in parts of it.
    """

    url: str

    def __init__(
        self, token: str = "hf_test", user: str = "user", read_only: bool = False, part_bytes: int = 2**26
    ) -> None:
        self.token = token
        self.user = user
        self.read_only = read_only
        self.part_bytes = part_bytes
        self.repos: dict[str, Repository] = {}
        self._signature = secrets.token_hex(8)  # of links for uploads, which are followed without a token

    def answer(self, exchange: Exchange) -> Answer:
        """Does what is asked for."""
        path = exchange.path.partition("?")[0]
        try:
            for method, pattern, action in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == exchange.method.replace("HEAD", "GET"):
                    return action(self, exchange, *map(unquote, found.groups("")))
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            return Answer({"error": error.message} | error.extra, error.status, headers)

    def _signed_in(self, exchange: Exchange) -> bool:
        given = exchange.headers.get("authorization")
        if given not in (None, f"Bearer {self.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        return given is not None

    def _find(self, exchange: Exchange, repo_id: str, write: bool = False) -> Repository:
        """A repository, if the one who asks may see it (and write to it)."""
        known, own = self._signed_in(exchange), repo_id.split("/")[0] == self.user
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (known and own)) or (write and not known):
            # For https, the client takes a 401 for this code also where there is none.
            raise HubError(*((404, "Repository not found") if known else (401, WHO)), code="RepoNotFound")
        if write and self.read_only:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if write and not own:
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def whoami(self, exchange: Exchange) -> Answer:
        if not self._signed_in(exchange):
            raise HubError(401, WHO)
        access = {"displayName": "test", "role": "read" if self.read_only else "write"}
        auth = {"type": "access_token", "accessToken": access}
        return Answer({"type": "user", "id": "0", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def validate(self, exchange: Exchange) -> Answer:
        front_matter(exchange.json()["content"])
        return Answer({"errors": [], "warnings": []})

    def create(self, exchange: Exchange) -> Answer:
        wanted = exchange.json()
        if not self._signed_in(exchange):
            raise HubError(401, WHO)
        owner = wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        link = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if owner != self.user or self.read_only:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", extra=link)
        self.repos[repo_id] = Repository(repo_id, private=wanted.get("visibility") == "private")
        return Answer(link)

    def delete(self, exchange: Exchange) -> Answer:
        wanted = exchange.json()
        repo = self._find(exchange, f"{wanted.get('organization') or self.user}/{wanted['name']}", write=True)
        del self.repos[repo.id]
        return Answer()

    def info(self, exchange: Exchange, repo_id: str, revision: str) -> Answer:
        return Answer(self._find(exchange, repo_id).info(revision or "main", "blobs" in exchange.query))

    def may_read(self, exchange: Exchange, repo_id: str) -> Answer:
        self._find(exchange, repo_id)
        return Answer()

    def may_write(self, exchange: Exchange, repo_id: str) -> Answer:
        self._find(exchange, repo_id, write=True)
        return Answer()

    def refs(self, exchange: Exchange, repo_id: str) -> Answer:
        return Answer(self._find(exchange, repo_id).refs())

    def tree(self, exchange: Exchange, repo_id: str, revision: str, folder: str) -> Answer:
        recursive = exchange.query.get("recursive", "").lower() == "true"
        return Answer(self._find(exchange, repo_id).at(revision).tree(folder, recursive))

    def paths(self, exchange: Exchange, repo_id: str, revision: str) -> Answer:
        commit = self._find(exchange, repo_id).at(revision)
        wanted = parse_qs(exchange.body.decode())["paths"]
        return Answer([line for line in commit.tree("", recursive=True) if line["path"] in wanted])

    def make_branch(self, exchange: Exchange, repo_id: str, branch: str) -> Answer:
        repo = self._find(exchange, repo_id, write=True)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.at(exchange.json().get("startingPoint", "main")).sha
        return Answer({})

    def preupload(self, exchange: Exchange, repo_id: str, branch: str) -> Answer:
        repo = self._find(exchange, repo_id, write=True)
        return Answer({"files": repo.preupload(branch, exchange.json()["files"])})

    def batch(self, exchange: Exchange, repo_id: str) -> Answer:
        """Says where each large file has to be sent, or that it is here already."""
        repo, objects = self._find(exchange, repo_id, write=True), []
        for wanted in exchange.json()["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repo.objects:
                objects[-1]["actions"] = self._upload_links(repo_id, wanted["oid"], wanted["size"])
        return Answer({"transfer": "basic", "objects": objects})

    def _upload_links(self, repo_id: str, oid: str, size: int) -> Json:
        link = f"{self.url}/lfs/{repo_id}/{oid}?signature={self._signature}"
        verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
        if size <= self.part_bytes:
            return {"upload": {"href": link}, "verify": verify}
        parts = {str(n): f"{link}&part={n}" for n in range(1, -(-size // self.part_bytes) + 1)}
        return {"upload": {"href": link, "header": {"chunk_size": str(self.part_bytes)} | parts}, "verify": verify}

    def upload(self, exchange: Exchange, repo_id: str, oid: str) -> Answer:
        """Takes a large file or a part of one; the signature stands for the token."""
        repo = self._follow(exchange, repo_id)
        if "part" in exchange.query:
            return Answer(
                b"", headers={"ETag": repo.store_part(oid, int(exchange.query["part"]), bytes(exchange.body))}
            )
        repo.store(oid, bytes(exchange.body))
        return Answer(b"")

    def complete(self, exchange: Exchange, repo_id: str, oid: str) -> Answer:
        self._follow(exchange, repo_id).join_parts(oid, exchange.json()["parts"])
        return Answer({"success": True})

    def _follow(self, exchange: Exchange, repo_id: str) -> Repository:
        if exchange.query.get("signature") != self._signature:
            raise HubError(403, "The request signature we calculated does not match the signature you provided.")
        return self.repos[repo_id]

    def verify(self, exchange: Exchange, repo_id: str) -> Answer:
        repo, wanted = self._find(exchange, repo_id, write=True), exchange.json()
        if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object does not exist")
        return Answer({})

    def commit(self, exchange: Exchange, repo_id: str, branch: str) -> Answer:
        repo = self._find(exchange, repo_id, write=True)
        if "create_pr" in exchange.query:
            raise HubError(400, "Pull requests are left out here.")
        header, *operations = map(json.loads, exchange.body.splitlines())
        sha = repo.commit(branch, header["value"], operations).sha
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"})

    def resolve(self, exchange: Exchange, repo_id: str, revision: str, path: str) -> Answer:
        """A file, or the range of it that is asked for."""
        commit = self._find(exchange, repo_id).at(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        data, oid = commit.files[path], commit.content_id(path)
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": commit.sha, "Content-Type": "application/octet-stream"}
        if path in commit.large:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", exchange.headers.get("range", ""))
        if asked is None:
            return Answer(data, 200, headers)
        first = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, len(data)) if asked[1] and asked[2] else len(data)
        if first >= end:
            return Answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
        return Answer(data[first:end], 206, headers | {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"})


WHO = "Invalid username or password."
NAME = r"([\w.-]+(?:/[\w.-]+)?)"
MODEL = f"/api/models/{NAME}"
ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", "/api/repos/create", Hub.create),
    ("DELETE", "/api/repos/delete", Hub.delete),
    ("GET", f"{MODEL}(?:/revision/([^/]+))?", Hub.info),
    ("GET", f"{MODEL}/auth-check", Hub.may_read),
    ("GET", f"{MODEL}/auth-check/write", Hub.may_write),
    ("GET", f"{MODEL}/refs", Hub.refs),
    ("GET", f"{MODEL}/tree/([^/]+)(?:/(.+))?", Hub.tree),
    ("POST", f"{MODEL}/paths-info/([^/]+)", Hub.paths),
    ("POST", f"{MODEL}/branch/([^/]+)", Hub.make_branch),
    ("POST", f"{MODEL}/preupload/([^/]+)", Hub.preupload),
    ("POST", f"{MODEL}/commit/([^/]+)", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", Hub.verify),
    ("PUT", f"/lfs/{NAME}/([0-9a-f]{{64}})", Hub.upload),
    ("POST", f"/lfs/{NAME}/([0-9a-f]{{64}})", Hub.complete),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
)


def front_matter(card: str) -> Json:
    """Metadata of a model card.

    Raises:
        HubError: they are no YAML.
    """
    found = re.match(r"---\r?\n(.*?)\r?\n---\s", card + "\n", re.DOTALL)
    try:
        return (yaml.safe_load(found[1]) or {}) if found else {}
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid metadata in README.md.", extra={"errors": [{"message": str(error)}]}) from error


def git_id(data: bytes) -> str:
    """Of a file, as `git hash-object` prints it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
