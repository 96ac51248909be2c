"""The tables of docs/benchmarks.md on serving and their picture, from measured results.

`linker bench decode --results FILE; linker bench serve --results FILE` measures, then
`python -m tests.benchmarks.serving FILE` prints the tables and draws docs/serving.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PICTURE = Path("docs/serving.svg")
_BATCHES = ("batch 1", "batch 8", "batch 16")
_BATCH_BARS = {"batch 1": 1.4, "batch 8": 1.5, "batch 16": 1.15, "prefill": 1.0}
_COLOURS = ("tab:blue", "tab:cyan", "tab:orange", "tab:red", "tab:gray", "tab:olive")

Results = Mapping[str, Mapping[str, Any]]


class Row(NamedTuple):
    """One ratio and what it shall be."""

    work: str
    against: str
    ratio: float
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is as it shall be."""
        return self.ratio <= self.bar if self.at_most else self.ratio >= self.bar


def rows(results: Results) -> Iterator[Row]:
    """Yields the ratios of the scenarios that were measured."""
    if single := results.get("decode single"):
        for work, bar in _BATCH_BARS.items():
            if best := _best(single[work], "vllm"):
                name = "first token of 512" if work == "prefill" else f"one variant, {work}"
                yield Row(name, best, single[work]["ratios"][best], bar)
                if rounded := single[work].get("rounded"):
                    yield Row(f"{name}, medium", best, rounded["ratios"][best], bar)
        over = single["read"]["steps_over_reads"]
        yield Row("a token alone", "reading the weights", over, 1.6, at_most=True)
    if kin := results.get("decode kin"):
        yield Row("8 equal variants", "one variant", kin["ratios"]["equal"], 0.95)
        yield Row("8 variants, own heads", "one variant", kin["ratios"]["own-head"], 0.8)
    if fleet := results.get("decode fleet"):
        best, ratio = _best_of_runs(fleet["runs"])
        yield Row("4 variants, 2 streams each", best, ratio, 3.0)
        memory = max(run["memory_ratio"] for run in fleet["runs"].values())
        yield Row("their memory", "four processes of vLLM", memory, 0.4, at_most=True)
    if (http := results.get("serve single")) and "alone" not in http["runs"]:
        best, ratio = _best_of_runs(http["runs"])
        yield Row("8 streams over HTTP", best, ratio, 2.5)
    if variants := results.get("serve variants"):
        yield Row("4 variants over HTTP", "one variant", variants["ratio"], 0.85)


def _best(compared: Mapping[str, Any], prefix: str) -> str | None:
    """Returns the fastest of the peers whose names begin so."""
    names = [name for name in compared["ratios"] if name.startswith(prefix)]
    return max(names, key=lambda n: compared["figures"][n]["tokens_per_s"], default=None)


def _best_of_runs(runs: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the fastest peer of all runs, and our ratio to it in its run."""
    found = [(run, name) for run in runs.values() for name in run["ratios"]]
    run, best = max(found, key=lambda pair: pair[0]["figures"][pair[1]]["tokens_per_s"])
    return best, run["ratios"][best]


def tables(results: Results) -> Iterator[str]:
    """Yields the lines of the ratios, then of every contender's figures."""
    yield "| work | against | ratio | bar |"
    yield "|---|---|---|---|"
    for row in rows(results):
        sign = "≤" if row.at_most else "≥"
        yield f"| {row.work} | {row.against} | {row.ratio:.2f} | {sign} {row.bar} |"
    yield ""
    yield "Latencies are the 50th, 95th and 99th percentile, in ms."
    yield ""
    yield "| scenario | work | contender | tok/s | first token | between tokens |"
    yield "|---|---|---|---|---|---|"
    for scenario, found in results.items():
        for work, figures in _at_any_depth(found, "figures"):
            for name, each in figures.items():
                latencies = " | ".join(_percentiles(each, kind) for kind in ("ttft_ms", "itl_ms"))
                rate = f"{each['tokens_per_s']:.1f}"
                yield f"| {scenario} | {work} | {name} | {rate} | {latencies} |"
    yield ""
    yield "| scenario | contender | command |"
    yield "|---|---|---|"
    for scenario, found in results.items():
        commands = {k: v for _, each in _at_any_depth(found, "commands") for k, v in each.items()}
        for name, command in commands.items():
            yield f"| {scenario} | {name} | `{command}` |"


def _at_any_depth(
    found: Mapping[str, Any], wanted: str, under: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the mappings of that name with the names that they lie under."""
    for name, value in found.items():
        if name == wanted:
            yield under, value
        elif isinstance(value, Mapping):
            yield from _at_any_depth(value, wanted, f"{under} {name}".strip())


def _percentiles(figures: Mapping[str, Any], kind: str) -> str:
    return " / ".join(f"{value:.0f}" for value in figures.get(kind, {}).values())


def draw(results: Results, path: Path) -> None:
    """Draws tokens a second by batch, and every ratio beside its bar."""
    mpl.rcParams["svg.hashsalt"] = "linker"  # the same results give the same file
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if single := results.get("decode single"):
        _draw_batches(left, single)
    _draw_ratios(right, list(rows(results)))
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_batches(axes: Axes, single: Mapping[str, Any]) -> None:
    names = list(single["batch 1"]["figures"])
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        rates = [single[batch]["figures"][name]["tokens_per_s"] for batch in _BATCHES]
        places = [place + number * width - 0.4 + width / 2 for place in range(len(_BATCHES))]
        bars = axes.bar(places, rates, width, label=name, color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=6)
    axes.set_xticks(range(len(_BATCHES)), _BATCHES)
    axes.set_ylabel("tokens per second")
    axes.set_title("One variant, by batch")
    axes.legend(fontsize=7)


def _draw_ratios(axes: Axes, found: Sequence[Row]) -> None:
    places = range(len(found))
    axes.barh(
        places,
        [row.ratio for row in found],
        color=["tab:blue" if row.met else "tab:orange" for row in found],
    )
    for place, row in zip(places, found, strict=True):
        axes.plot([row.bar] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    labels = [f"{row.work}{' (at most)' * row.at_most}: {row.ratio:.2f}" for row in found]
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_title("Ratios, and what they shall be (black)")


def main() -> None:
    """Prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path)
    results: Results = json.loads(parser.parse_args().results.read_text())
    print("\n".join(tables(results)))
    draw(results, _PICTURE)


if __name__ == "__main__":
    main()
