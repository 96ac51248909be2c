"""Text that every Python installation has, made into documents and dialogues. Knows no model.

Nothing is imported or run to get it: the standard library is read as source text. The same Python
gives the same corpus, in the same order, on every machine.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as reference_topics
from typing import Final

_MAX_DOCUMENT_CHARS: Final = 60_000  # no single document may fill the corpus
_SUMMARY_CHARS: Final = range(20, 160)  # an answer that says something and ends
_SKIPPED: Final = frozenset({"antigravity", "this", "turtle"})  # jokes, and much repetition
_PARAGRAPH: Final = re.compile(r"\n\s*\n")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s")
_MARKUP: Final = re.compile(r":\w+:|`|\*{2,}|={3,}|-{3,}|~{3,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that can be asked about: a function, a class, a module or a language topic."""

    name: str  # "textwrap.dedent", "the assert statement"
    text: str  # its documentation as it stands
    summary: str  # the first sentence, on one line; empty if there is none worth quoting


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Everything that the family learns from, in a fixed order."""

    prose: tuple[str, ...]  # the language reference, then the modules' docstrings
    sources: tuple[str, ...]  # the modules themselves
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str


Dialogue = tuple[Message, ...]


def read_corpus() -> Corpus:
    """Reads the standard library of the Python that runs this; takes about two seconds."""
    entries = [_entry(name, reference_topics[name]) for name in sorted(reference_topics)]
    prose = [entry.text for entry in entries]
    sources = []
    for path in _source_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        found = list(_documented(path.stem, source))
        entries += found
        sources.append(source[:_MAX_DOCUMENT_CHARS])
        if found:
            prose.append("\n\n".join(f"{entry.name}: {entry.text}" for entry in found))
    return Corpus(
        prose=tuple(text[:_MAX_DOCUMENT_CHARS] for text in prose),
        sources=tuple(sources),
        entries=tuple(entries),
    )


def instructions(entries: Sequence[Entry]) -> list[Dialogue]:
    """Returns one question with a plain answer for every entry that has a summary."""
    return [
        (
            Message(role="user", content=f"What is {entry.name}?"),
            Message(role="assistant", content=entry.summary),
        )
        for entry in _worth_asking(entries)
    ]


def conversations(entries: Sequence[Entry]) -> list[Dialogue]:
    """Returns talks of two questions each, in a chattier voice than `instructions`."""
    asked = _worth_asking(entries)
    return [
        (
            Message(role="user", content=f"Hi! Tell me about {first.name}."),
            Message(role="assistant", content=f"Sure thing! {first.summary} Shall we go on?"),
            Message(role="user", content=f"Yes, and {second.name}?"),
            Message(role="assistant", content=f"Happy to! {second.summary} Ask me more!"),
        )
        for first, second in zip(asked, asked[1:] + asked[:1], strict=True)
    ]


def _worth_asking(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if len(entry.summary) in _SUMMARY_CHARS]


def _source_files() -> list[Path]:
    """The single-file modules of the standard library; packages hold tests and tables besides."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("[a-z]*.py"))
    return [path for path in paths if path.stem not in _SKIPPED]


def _documented(module: str, source: str) -> Iterator[Entry]:
    """Yields what has a docstring: the module, its public classes and functions, their methods."""
    tree = ast.parse(source)
    if docstring := ast.get_docstring(tree):
        yield _entry(f"the {module} module", docstring)
    yield from _documented_in(tree, module)


def _documented_in(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring and not child.name.startswith("_"):
            yield _entry(name, docstring)
        if isinstance(child, ast.ClassDef):
            yield from _documented_in(child, name)


def _entry(name: str, text: str) -> Entry:
    plain = _MARKUP.sub("", text).strip()
    # The first paragraph of a topic is its heading.
    paragraphs = [part for part in _PARAGRAPH.split(plain) if part.rstrip().endswith((".", ":"))]
    first = " ".join(paragraphs[0].split()) if paragraphs else ""
    summary = _SENTENCE_END.split(first)[0]
    return Entry(name=name, text=plain, summary=summary if summary.endswith(".") else "")
