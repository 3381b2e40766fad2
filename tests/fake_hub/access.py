"""Who is asking, which repositories they see, and whether they may write."""

from __future__ import annotations

from tests.fake_hub.exchange import Answer, Exchange, HubError
from tests.fake_hub.repository import Repository


WHO = "Invalid username or password."


class Access:
    """Accounts, and who may do what.

    Attributes:
        url (`str`): where the Hub is reached.
        repos (`dict[str, Repository]`): by `user/name`; may be written, too.

    Args:
        token (`str`): the only one that is let in.
        user (`str`): its owner, who may write below `user/` and nowhere else.
        read_only (`bool`): the token may not write.
    """

    url: str

    def __init__(self, token: str, user: str, read_only: bool) -> None:
        self.token = token
        self.user = user
        self.read_only = read_only
        self.repos: dict[str, Repository] = {}

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

    def may_read(self, exchange: Exchange, repo_id: str) -> Answer:
        self._find(exchange, repo_id)
        return Answer()

    def may_write(self, exchange: Exchange, repo_id: str) -> Answer:
        self._find(exchange, repo_id, write=True)
        return Answer()
