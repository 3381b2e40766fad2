"""A repository: its commits, its branches, and the large files it was sent."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from types import MappingProxyType

import yaml

from tests.fake_hub.commits import Commit, sha256
from tests.fake_hub.exchange import HubError, Json


LARGE_BYTES = 10_000_000
LARGE_NAMES = ("*.bin", "*.safetensors", "*.onnx", "*.pt", "*.pth", "*.npy", "*.npz", "*.zip", "*.gz", "*tfevents*")
GIT_ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE_NAMES).encode()


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
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
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
