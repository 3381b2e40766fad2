"""A state of a repository: its files, and how the Hub lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from tests.fake_hub.exchange import HubError, Json


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


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


def git_id(data: bytes) -> str:
    """Of a file, as `git hash-object` prints it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
