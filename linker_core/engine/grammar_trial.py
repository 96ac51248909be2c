"""Compiles a grammar on trial, in a process of its own, before the engine compiles it for good.

Some short grammars, such as intersections of patterns, take llguidance endless time and memory
whatever limits it is given. Only a process can be stopped. This file is also the program that the
process runs, with the grammar at its standard input.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance

MAX_CPU_S = 2
_MAX_WALL_S = 30  # for a process that waits for something, which none should
_MAX_BYTES = 2 << 30  # of addresses, most of them never touched
# Of one matcher; about 30 MB where every state is a large one. Ordinary JSON schemas, 60 fields and
# formats among them, come to less than 2,000; a bounded string takes about 9 for every character
# that is written of it, so it may have some 1,700.
_MAX_LEXER_STATES = 16_000
_MAX_GRAMMAR_SYMBOLS = 100_000


def limits() -> llguidance.LLParserLimits:
    """Returns what bounds a matcher, on trial and in the engine."""
    import llguidance  # noqa: PLC0415 - with the first grammar

    # What its other limits leave open is work: about 20 ms for a mask.
    return llguidance.LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=_MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,  # they would hold the answer so far
    )


def ends(grammar: str) -> bool:
    """Says whether llguidance comes to an end with a grammar, be it an error.

    Waits for a process that takes at most `MAX_CPU_S` of a processor.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "linker_core.engine.grammar_trial"],
            input=grammar.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_MAX_WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    """Compiles what comes in, within the limits of the process."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llguidance  # noqa: PLC0415 - with the first grammar

    grammar = sys.stdin.buffer.read().decode()
    # Which tokens there are hardly matters to what is slow here; bytes are there at once.
    llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits())


if __name__ == "__main__":
    main()
