"""Commands as messages name them."""

import shlex


def command(*words: object) -> str:
    """Returns a command of ``greedy`` in backticks, its words quoted for a shell."""
    return f"`greedy {shlex.join(map(str, words))}`"
