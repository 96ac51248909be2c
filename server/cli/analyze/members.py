"""Which models a study is of: folders on the command line, or a family that a server here serves.

A served family is looked up in the server's registry, since a server tells nobody its directories.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.family import StudiedFamily
from analysis.selection import select
from linker_core.errors import InvalidRequestError, LinkerError, ModelNotFoundError
from linker_core.weights.lora import is_adapter
from server.onboarding.hub.cache import HubCache
from server.onboarding.hub.source import HubSource, is_hub_source
from server.registry.database import parse_url, registry_exists
from server.registry.records import ModelRecord, ModelState
from server.registry.store import Registry
from server.settings import Settings, load_settings

_SERVED = (ModelState.READY, ModelState.UNLOADED)
_WITHOUT_WEIGHTS = ("delta", "adapter")  # policies of sources that hold no weights of their own


class Members(NamedTuple):
    """Directories of a family."""

    base_name: str
    base: Path
    variants: dict[str, Path]
    notes: tuple[str, ...]  # what was left out, in words

    def open(self) -> StudiedFamily:
        """Opens all of them; see `StudiedFamily.open`."""
        return StudiedFamily.open(self.base, self.variants)


def add_member_arguments(parser: argparse.ArgumentParser, *, least: int = 1) -> None:
    """Declares BASE VARIANT …, or FAMILY; least is the number of variants that it takes."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"BASE and {_or_more(least)} VARIANT folders, called as their folder or by "
        "NAME=FOLDER; or the name of one family that a server of this machine serves, "
        "looked up in its registry",
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="with a family: the server's YAML settings, which say where its registry is",
    )
    parser.add_argument(
        "--state",
        type=Path,
        help="with a family: the server's state directory, which holds its registry",
    )


def add_second_family(
    parser: argparse.ArgumentParser, option: str, *, purpose: str, required: bool = False
) -> None:
    """Declares an option that names another family, as the first is named.

    Args:
        parser: Of a study.
        option: Such as --source.
        purpose: What it is for.
        required: Whether the study needs it.
    """
    parser.add_argument(
        option,
        nargs="+",
        required=required,
        metavar="MODEL",
        help=f"another family, named as the first is, by folders or as a served one: {purpose}",
    )


def add_tensor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --tensors."""
    parser.add_argument(
        "--tensors",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="which tensors (default: q, k, v, o, gate, up and down of every layer)",
    )


def selected(args: argparse.Namespace, family: StudiedFamily) -> tuple[str, ...]:
    """Returns the tensors that --tensors names; see `select`."""
    return select(family.base, args.tensors)


def open_family(args: argparse.Namespace) -> StudiedFamily:
    """Opens what `add_member_arguments` took; see `find_members`."""
    return find_members(args).open()


def find_members(args: argparse.Namespace, *, least: int = 1) -> Members:
    """Returns the directories that a command line means.

    Args:
        args: As `add_member_arguments` declares them.
        least: How many variants the study takes, for what is said of none.

    Raises:
        InvalidRequestError: No variant, two of one name, no such folder, or no such registry.
        ModelNotFoundError: No such family.
    """
    (found,) = find_families(args, [args.models], least=least)
    return found


def find_families(
    args: argparse.Namespace, families: Sequence[Sequence[str]], *, least: int = 1
) -> list[Members]:
    """Returns the directories of several families, each BASE VARIANT … or a served one's name.

    Args:
        args: Hold --config and --state.
        families: As they are called on the command line.
        least: How many variants of each the study takes, for what is said of none.

    Raises:
        LinkerError: As `find_members`.
    """
    folders_alone = all(len(models) > 1 for models in families)
    if folders_alone and (args.config is not None or args.state is not None):
        raise InvalidRequestError(
            "--config and --state say where a served family is known, whose name stands alone; "
            "folders need neither."
        )
    return [_found(args, models, least) for models in families]


def _found(args: argparse.Namespace, models: Sequence[str], least: int) -> Members:
    if len(models) > 1:
        return _folders(models)
    (name,) = models
    if Path(name).is_dir():
        raise InvalidRequestError(
            f"{name} is a base; name {_or_more(least)} fine-tunes of it, too."
        )
    return _served(name, args)


def _folders(models: Sequence[str]) -> Members:
    """Returns BASE VARIANT … as they are called on a command line.

    Raises:
        InvalidRequestError: Two of one name, or no such folder.
    """
    (base_name, base), *rest = map(_named, models)
    variants: dict[str, Path] = {}
    for name, path in rest:
        if name in variants or name == base_name:
            raise InvalidRequestError(
                f"Two models are called {name}. Give one another name, as OTHER={path}."
            )
        variants[name] = path
    for path in (base, *variants.values()):
        if not path.is_dir():
            raise InvalidRequestError(
                f"There is no folder {path}. Name BASE and VARIANT folders that exist; the name of "
                "a family that a server serves stands alone."
            )
    return Members(base_name, base, variants, ())


def _or_more(least: int) -> str:
    return f"{('one', 'two', 'three')[least - 1]} or more"


def _named(model: str) -> tuple[str, Path]:
    name, equals, folder = model.partition("=")
    if equals and name and "/" not in name:
        return name, Path(folder)
    path = Path(model)
    return path.name or path.resolve().name, path


def _served(family: str, args: argparse.Namespace) -> Members:
    """Looks a family up in the registry of a server."""
    storage = {} if args.state is None else {"state": args.state}
    settings = load_settings(args.config, {"storage": storage})
    url = parse_url(settings.registry_url())
    if not registry_exists(url):
        raise InvalidRequestError(
            f"{family} is no folder, and there is no registry that could know a family of that "
            "name. Name BASE and VARIANT folders, or the server's --state or --config.",
            param="state",
        )
    with contextlib.closing(Registry.open_beside(url)) as registry:
        records = registry.models()
    kin = [record for record in records if family == (record.family or record.name)]
    if not kin:
        raise ModelNotFoundError(_no_family(family, records))
    return _members(family, kin, settings)


def _members(family: str, kin: Iterable[ModelRecord], settings: Settings) -> Members:
    """Returns the folders of a family's models, as far as they can be studied."""
    notes: list[str] = []
    folders: dict[str, Path] = {}
    for record in kin:
        if record.state not in _SERVED:
            notes.append(f"{record.name} is {record.state}, and left out")
        elif (folder := _folder(record, settings)) is None:
            notes.append(f"{record.name} has no weights of its own on disk, and is left out")
        else:
            folders[record.name] = folder
    if family not in folders:
        raise LinkerError(
            f"The base of {family} is not to be found here: {'; '.join(notes) or 'it is gone'}. "
            "Name BASE and VARIANT folders."
        )
    base = folders.pop(family)
    return Members(family, base, folders, tuple(notes))


def _folder(record: ModelRecord, settings: Settings) -> Path | None:
    """Returns where a model's checkpoint is; None for deltas, adapters and downloads that went."""
    plan: Mapping[str, object] = record.plan or {}
    if plan.get("policy") in _WITHOUT_WEIGHTS:
        return None
    if not is_hub_source(record.source):
        path = Path(record.source)
        return None if is_adapter(path) else path
    found = HubCache(settings.hub_directory()).find(HubSource.parse(record.source))
    return None if found is None else found.path


def _no_family(family: str, records: Iterable[ModelRecord]) -> str:
    families = sorted({record.family or record.name for record in records})
    near = difflib.get_close_matches(family, families, n=1, cutoff=0.5)
    if near:
        return f"No family is called {family!r}. Did you mean {near[0]!r}?"
    known = f"The families are {', '.join(families)}." if families else "It knows no model."
    return f"No family is called {family!r} in the server's registry. {known}"
