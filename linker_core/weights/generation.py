"""What generation_config.json says about sampling, within bounds. Knows no model."""

from __future__ import annotations

from linker_core.weights.fields import Fields

GENERATION_FILE = "generation_config.json"
_BOUNDS = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}


def sampling_defaults(fields: Fields) -> dict[str, float | int]:
    """Returns the sampling defaults that the file states; null and top_k <= 0 state nothing.

    `do_sample: false` is temperature 0 whatever else the file says, as transformers has it.

    Raises:
        BadCheckpointError: A value of another type or out of bounds.
    """
    defaults: dict[str, float | int] = {}
    for key, (low, high) in _BOUNDS.items():
        if (value := fields.optional_number(key, low=low, high=high)) is not None:
            defaults[key] = value
    top_k = fields.optional_number("top_k", low=-1, high=1 << 22)
    if top_k is not None and top_k >= 1:
        defaults["top_k"] = int(top_k)
    if not fields.boolean("do_sample", default=True):
        defaults["temperature"] = 0.0
    return defaults
