"""A plan that came from a stranger: every field's type and bounds, every total worked out anew."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, get_args

from linker_core.config import MatmulPrecision
from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.sharing.plan import Policy, SharePlan
from linker_core.sharing.price import Price
from linker_core.sharing.report import Region
from linker_core.sharing.rungs import AnyRung, Residual, Rung, parse_rung
from linker_core.weights import strict_json
from linker_core.weights.fields import Fields
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME

_POLICIES = tuple(policy for policy in Policy if policy is not Policy.DONOR)
_MAX_BYTES: Final = 1 << 50
_MAX_TEXT = 256
_MAX_ENCODING: Final = 1 << 16
HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_COUNTS = ("logical_bytes", "unique_bytes", "num_weights", "checkpoint_bytes")
_LINE = re.compile(r"[^\x00-\x1f\x7f]*")


def parse_plan(
    text: str, *, shapes: Mapping[str, tuple[int, ...]], num_layers: int, source: str
) -> SharePlan:
    """Reads the JSON of `SharePlan.to_json`; what its bytes are the caller checks.

    Args:
        text: The JSON.
        shapes: Name -> shape of every tensor of the model.
        num_layers: Of the model.
        source: How error messages call the plan.

    Raises:
        BadCheckpointError: A field that is missing, unknown, of another type or out of bounds; a
            rung that its tensor cannot have; a number that does not follow from the others.
    """
    try:
        record = strict_json.parse(text.encode(), max_depth=4)
    except ValueError as error:
        raise BadCheckpointError(f"{source}: not valid JSON: {error!s:.200}.") from error
    if not isinstance(record, dict):
        raise BadCheckpointError(f"{source}: holds no JSON object.")
    fields = Fields(record, source)
    _check_scalars(fields, num_layers)
    _check_price(record.get("price"), source)
    rungs = _rungs(fields, shapes)
    _check_own_rows(fields, rungs, shapes)
    _check_counts(fields, "rung_bytes", record.get("rung_bytes"))
    try:
        plan = SharePlan.from_json(record | {"rungs": {n: str(r) for n, r in rungs.items()}})
    except KeyError as error:
        raise fields.refuse(str(error.args[0]), None, "a value") from error
    if plan.num_weights != sum(map(math.prod, shapes.values())):
        raise fields.refuse("num_weights", plan.num_weights, "what the config's tensors have")
    if plan.to_json() != record:
        again = plan.to_json()
        odd = sorted(
            key for key in record.keys() | again.keys() if record.get(key) != again.get(key)
        )
        raise BadCheckpointError(
            f"{source}: {odd[0]!r:.60} is unknown or does not follow from the rest. Export again."
        )
    return plan


def _check_scalars(fields: Fields, num_layers: int) -> None:
    fields.choice("policy", _POLICIES)
    if fields.record.get("region") is not None:
        fields.choice("region", tuple(Region))
    for key in ("mean_cos", "tau_cos"):
        fields.optional_number(key, low=-1.01, high=1.01)
    for key in ("mean_epsilon", "tau_frob", "budget_kl"):
        fields.optional_number(key, low=0.0, high=1e9)
    _check_text(fields, "threshold_source")
    for key in ("donor_fingerprint", "variant_fingerprint"):
        value = fields.record.get(key)
        if not isinstance(value, str) or not HEX_DIGEST.fullmatch(value):
            raise fields.refuse(key, value, "64 hexadecimal digits")
    for key in _COUNTS:
        fields.integer(key, low=0, high=_MAX_BYTES)
    blocks = fields.record.get("blocks")
    _check_counts(fields, "blocks", blocks)
    for key in ("alias", "residual", "own"):
        Fields(blocks or {}, f"{fields.source}: blocks").integer(key, low=0, high=num_layers)


def _check_text(fields: Fields, key: str) -> None:
    value = fields.record.get(key)
    if value is None:
        return
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not _LINE.fullmatch(value):
        raise fields.refuse(key, value, f"a line of at most {_MAX_TEXT} characters")


def _check_counts(fields: Fields, key: str, value: Any) -> None:
    sound = isinstance(value, dict) and all(
        type(count) is int and 0 <= count <= _MAX_BYTES for count in value.values()
    )
    if not sound:
        raise fields.refuse(key, value, "an object of whole numbers")


def _check_price(value: Any, source: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or value.keys() != set(Price.__dataclass_fields__):
        raise Fields({}, source).refuse("price", value, "null or a measured price")
    fields = Fields(value, f"{source}: price")
    for key in ("kl", "kl_upper", "ppl_ratio"):
        fields.number(key, low=0.0, high=1e9)
    fields.number("top1", low=0.0, high=1.0)
    fields.integer("tokens", low=0, high=1 << 40)
    if value["calibration"] is None:
        raise fields.refuse("calibration", None, "what the text was")
    _check_text(fields, "calibration")
    if value["matmul_precision"] is not None:
        fields.choice("matmul_precision", get_args(MatmulPrecision))
    if value["encoding"] is not None:
        fields.integer("encoding", low=0, high=_MAX_ENCODING)


def _rungs(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AnyRung]:
    stated = fields.record.get("rungs")
    if not isinstance(stated, dict) or stated.keys() != shapes.keys():
        odd = sorted(set(stated) ^ set(shapes)) if isinstance(stated, dict) else ["rungs"]
        raise BadCheckpointError(
            f"{fields.source}: rungs are not those of the config's {len(shapes)} tensors; first "
            f"difference {odd[0]!r:.100}. Take config and delta from the same export."
        )
    rungs: dict[str, AnyRung] = {}
    for name, shape in shapes.items():
        try:
            rung = parse_rung(stated[name]) if isinstance(stated[name], str) else None
        except InvalidRequestError:
            rung = None
        if rung is None or str(rung) != stated[name] or not is_legal(name, rung, shape):
            raise BadCheckpointError(
                f"{fields.source}: tensor {name} of shape {list(shape)} cannot be on rung "
                f"{stated[name]!r:.60}. Export again."
            )
        rungs[name] = rung
    return rungs


def is_legal(name: str, rung: AnyRung, shape: tuple[int, ...]) -> bool:
    """Returns whether a delta file may have a tensor of this shape on a rung."""
    if isinstance(rung, Residual):
        return len(shape) == 2 and rung.rank <= min(shape)
    return rung is not Rung.ROWS or name in (EMBED_NAME, LM_HEAD_NAME)


def _check_own_rows(
    fields: Fields, rungs: Mapping[str, AnyRung], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    stated = fields.record.get("own_rows")
    of_rows = {name for name, rung in rungs.items() if rung is Rung.ROWS}
    if not isinstance(stated, dict) or stated.keys() != of_rows:
        raise fields.refuse("own_rows", stated, "the rows of each tensor on rung rows")
    counts = Fields(stated, f"{fields.source}: own_rows")
    for name in of_rows:
        counts.integer(name, low=0, high=shapes[name][0])
