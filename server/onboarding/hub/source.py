"""What `hub:ORG/NAME@REVISION` means: names are checked here, nothing is asked of a hub."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from linker_core.errors import InvalidRequestError
from server.settings import HUB_SCHEME

DEFAULT_REVISION = "main"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository at a revision. One whose revision is a commit always means the same files."""

    repo: str  # ORG/NAME
    revision: str  # a branch, a tag or a commit of 40 hexadecimal digits

    @classmethod
    def parse(cls, source: str) -> Self:
        """Reads `hub:ORG/NAME` or `hub:ORG/NAME@REVISION`.

        Raises:
            InvalidRequestError: It is neither.
        """
        repo, at, revision = source.removeprefix(HUB_SCHEME).partition("@")
        odd = _REPO.fullmatch(repo) is None or ".." in repo or "--" in repo or repo.endswith(".git")
        revision = revision if at else DEFAULT_REVISION
        if odd or _REVISION.fullmatch(revision) is None or ".." in revision:
            raise InvalidRequestError(
                "A source on the hub is written hub:ORG/NAME or hub:ORG/NAME@REVISION, where the "
                "revision is a branch, a tag or a commit. Addresses are not accepted.",
                param="source",
            )
        return cls(repo=repo, revision=revision)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def key(self) -> str:
        """A digest that names the source's files in the cache."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{HUB_SCHEME}{self.repo}@{self.revision}"


def is_hub_source(source: str) -> bool:
    """Returns whether a source is one on the hub, well written or not."""
    return source.startswith(HUB_SCHEME)
