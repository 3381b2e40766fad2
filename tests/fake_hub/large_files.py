"""The Hub's large file storage: announced, uploaded in one piece or in parts, verified."""

from __future__ import annotations

import secrets

from tests.fake_hub.access import Access
from tests.fake_hub.exchange import Answer, Exchange, HubError, Json
from tests.fake_hub.repository import Repository


class LargeFiles(Access):
    """Large files on their way to a repository.

    Args:
        part_bytes (`int`): files above this size are uploaded in parts of it.
    """

    def __init__(self, token: str, user: str, read_only: bool, part_bytes: int) -> None:
        super().__init__(token, user, read_only)
        self.part_bytes = part_bytes
        self._signature = secrets.token_hex(8)  # of links for uploads, which are followed without a token

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
