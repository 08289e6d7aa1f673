"""Commands as messages name them."""

import shlex


def command(*words: object) -> str:
    """A command of ``greedy`` in backticks, its words quoted as a shell wants them."""
    return f"`greedy {shlex.join(map(str, words))}`"
