"""All that a Hub answers, and which of it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs, unquote

from tests.fake_hub.exchange import Answer, Exchange, HubError
from tests.fake_hub.large_files import LargeFiles
from tests.fake_hub.repository import front_matter


class Hub(LargeFiles):
    """A Hub with one account.

    Args:
        token (`str`): the only one that is let in.
        user (`str`): its owner, who may write below `user/` and nowhere else.
        read_only (`bool`): the token may not write.
        part_bytes (`int`): large files above this size are uploaded in parts of it.
    """

    def __init__(
        self, token: str = "hf_test", user: str = "user", read_only: bool = False, part_bytes: int = 2**26
    ) -> None:
        super().__init__(token, user, read_only, part_bytes)

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

    def validate(self, exchange: Exchange) -> Answer:
        front_matter(exchange.json()["content"])
        return Answer({"errors": [], "warnings": []})

    def info(self, exchange: Exchange, repo_id: str, revision: str) -> Answer:
        return Answer(self._find(exchange, repo_id).info(revision or "main", "blobs" in exchange.query))

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


NAME = r"([\w.-]+(?:/[\w.-]+)?)"
MODEL = f"/api/(?:models|datasets)/{NAME}"
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
    ("POST", rf"(?:/datasets)?/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("POST", rf"(?:/datasets)?/{NAME}\.git/info/lfs/objects/verify", Hub.verify),
    ("PUT", f"/lfs/{NAME}/([0-9a-f]{{64}})", Hub.upload),
    ("POST", f"/lfs/{NAME}/([0-9a-f]{{64}})", Hub.complete),
    ("GET", f"(?:/datasets)?/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
)
