"""The dashboards as text, and where Grafana's provisioning looks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from configs.grafana.generator.savings import savings
from configs.grafana.generator.serving import serving
from configs.grafana.generator.weights import weights

FOLDER = Path(__file__).resolve().parents[1] / "dashboards"


def rendered() -> Mapping[str, str]:
    """Returns the text of every file by its name; the same text each time."""
    boards = {"savings": savings(), "serving": serving(), "weights": weights()}
    return {
        f"{name}.json": json.dumps(board, cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"
        for name, board in boards.items()
    }


def write() -> None:
    """Replaces the files."""
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
