"""The device's memory as a bar, and what sharing saves of it."""

from __future__ import annotations

from typing import NamedTuple

from rich.text import Text

from server.cli.top import amounts
from server.cli.top.fleet import Fleet


class _Part(NamedTuple):
    """Of the memory."""

    name: str
    nbytes: int
    mark: str
    plain_mark: str  # where there are but ASCII's characters
    style: str


def memory_lines(fleet: Fleet, *, width: int, is_ascii: bool) -> list[Text]:
    """Returns a bar of the device's memory, its legend, and what sharing saves.

    Args:
        fleet: Whose memory it is.
        width: In characters.
        is_ascii: Whether no other characters can be shown.
    """
    lines = [_saved(fleet)]
    device = None if fleet.status is None else fleet.status.device
    if device is None:
        return lines
    parts = (
        _Part("weights", device.weights, "█", "#", "cyan"),
        _Part("KV", device.kv, "▓", "+", "magenta"),
        _Part("other", device.other, "▒", "=", "yellow"),
        _Part("free", device.free, "░", ".", "bright_black"),
    )
    bar, legend = Text(no_wrap=True), Text(f"{device.name} ", no_wrap=True, overflow="ellipsis")
    for part, length in zip(parts, _lengths([p.nbytes for p in parts], width), strict=True):
        mark = part.plain_mark if is_ascii else part.mark
        bar.append(mark * length, part.style)
        legend.append(f" {mark} ", part.style)
        legend.append(f"{part.name} {amounts.of_bytes(part.nbytes)} ")
    return [bar, legend, *lines]


def _lengths(counts: list[int], width: int) -> list[int]:
    """Returns lengths in proportion to counts, `width` together; what is there has one at least."""
    total = sum(counts)
    if total <= 0:
        return [0] * len(counts)
    lengths = [max(1, width * count // total) if count > 0 else 0 for count in counts]
    longest = lengths.index(max(lengths))
    lengths[longest] += width - sum(lengths)  # what rounding has left
    return lengths


def _saved(fleet: Fleet) -> Text:
    saved, separate = fleet.saved_bytes, fleet.separate_bytes
    resident = sum(model.is_resident for model in fleet.models.values())
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"saved {amounts.of_bytes(saved)}", "bold green")
    if separate:
        ratio, apart = amounts.of_ratio(saved / separate), amounts.of_bytes(separate)
        copies = "copy" if resident == 1 else "copies"
        line.append(f" = {ratio} of the {apart} of {resident} separate {copies}")
    return line
