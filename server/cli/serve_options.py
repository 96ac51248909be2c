"""The command line of `linker serve`: its options become settings and the models to start with."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

from linker_core.config import MatmulPrecision
from linker_core.errors import InvalidRequestError
from linker_core.tuning.dialogues import load_dialogues
from linker_core.tuning.request import SELF_CALIBRATION
from server.onboarding.request import (
    SHARING_OPTIONS,
    OnboardRequest,
    check_name,
    check_sharing,
    resolve_sharing,
)
from server.settings import POLICIES, Settings, SharingSettings, load_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `linker serve`; what is not given comes from --config, then defaults."""
    add = parser.add_argument
    add("--config", type=Path, help="YAML file of settings (see configs/default.yaml)")
    add(
        "--state",
        type=Path,
        help="directory of registry and compressed variants (default $XDG_DATA_HOME/linker-llm, "
        "else ~/.local/share/linker-llm)",
    )
    add("--models-root", type=Path, help="directory that POST /models may read models from")
    add(
        "--model",
        nargs="+",
        action="extend",
        metavar="NAME=SOURCE",
        help="serve these models from the start, each from a directory or from "
        "hub:ORG/NAME@REVISION; the first is the donor of the others",
    )
    add(
        "--policy",
        choices=POLICIES,
        help="how sharing is decided (budget; thresholds beside --tau-cos or --tier, bytes beside "
        "--max-bytes)",
    )
    add("--budget-kl", type=float, help="what sharing may cost, in nats per token (0.01)")
    add("--max-bytes", help="what a variant may hold to itself: 536870912, 512M, 8G")
    add("--calibration", help="text to measure costs on: self, or a file of JSON lines")
    add("--tau-cos", type=float, help="least cosine of a shared block; needs --tau-frob")
    add("--tau-frob", type=float, help="largest relative distance of a shared block")
    add("--tier", help="a row of families.yaml instead of thresholds")
    add("--memory-budget", help="bytes for weights and KV pages: 8589934592, 512M, 8G, 8GiB")
    add("--max-model-len", type=int, help="longest prompt and answer together, in tokens")
    add("--device", choices=("cpu", "cuda"))
    add(
        "--matmul-precision",
        choices=get_args(MatmulPrecision),
        help="medium rounds products' inputs to bfloat16: faster on CPUs with AVX512_BF16",
    )
    add("--host", help="interface to listen on (default 127.0.0.1)")
    add("--port", type=int, help="port to listen on (default 8000)")
    add(
        "--allowed-host",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names that requests may call the server by, beside localhost",
    )
    add("--no-auth", action="store_true", help="let everybody do everything, keys or not")
    add("--strict", action="store_true", help="exit when a start-up model fails")


def settings_from(args: argparse.Namespace) -> Settings:
    """Returns the settings of a command line.

    Raises:
        InvalidRequestError: A bad value.
    """
    flags: dict[str, dict[str, object]] = {
        "http": {
            "host": args.host,
            "port": args.port,
            "no_auth": args.no_auth or None,
            "allowed_hosts": args.allowed_host,
            "strict": args.strict or None,
        },
        "storage": {"state": args.state},
        "models": {"root": args.models_root, "serve": _named_paths(args.model)},
        "sharing": {
            option: getattr(args, option) for option in ("policy", *SHARING_OPTIONS, "calibration")
        },
        "engine": {
            "device": args.device,
            "matmul_precision": args.matmul_precision,
            "memory_budget": args.memory_budget,
            "max_model_len": args.max_model_len,
        },
    }
    given = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in flags.items()
    }
    settings = load_settings(args.config, given)
    if settings.models.root is not None and not settings.models.root.is_dir():
        raise InvalidRequestError(
            f"--models-root {settings.models.root} is no directory.", param="models_root"
        )
    return settings


def startup_requests(settings: Settings) -> list[OnboardRequest]:
    """Returns the start-up models as requests; the first is the donor of the others.

    Raises:
        InvalidRequestError: A bad or repeated name, or contradictory sharing options.
    """
    sharing, requests = settings.sharing, list[OnboardRequest]()
    check_defaults(sharing)
    for model in settings.models.serve:
        if any(model.name == other.name for other in requests):
            raise InvalidRequestError(
                f"--model: the name {model.name!r} is given twice.", param="model"
            )
        requests.append(
            OnboardRequest(
                name=model.name,
                source=model.source,
                donor=requests[0].name if requests else None,
            )
        )
        check_name(model.name)
    # A donor shares with nobody, so other options leave its stored row as it is.
    choice = resolve_sharing({}, sharing)
    requests[1:] = [replace(request, **choice) for request in requests[1:]]
    return requests


def check_defaults(sharing: SharingSettings) -> None:
    """Refuses sharing options that no model could be planned with, be there a model or not.

    Raises:
        InvalidRequestError: Contradictory options, an unknown tier, or a calibration file that
            cannot be used.
    """
    check_sharing(OnboardRequest(name="", source="", **resolve_sharing({}, sharing)))
    if sharing.calibration not in (None, SELF_CALIBRATION):
        load_dialogues(Path(sharing.calibration))


def _named_paths(values: list[str] | None) -> list[dict[str, str]] | None:
    if values is None:
        return None
    pairs = [value.partition("=") for value in values]
    for name, _, path in pairs:
        if not name or not path:
            raise InvalidRequestError(
                f"--model {name[:80]!r}: write NAME=SOURCE, with both parts.", param="model"
            )
    return [{"name": name, "path": path} for name, _, path in pairs]
