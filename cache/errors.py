"""The errors of stores."""

ADVICE = "write the store again"


class StoreError(Exception):
    """A store cannot be written or read as asked; one sentence."""


class DamagedStore(StoreError):
    """A file of a store is missing or does not hold what was written.

    Attributes:
        problem: the file or chunk, and what is wrong with it.
    """

    def __init__(self, problem: str, advice: str = ADVICE) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem


class UnreachableStore(StoreError):
    """Object storage that does not answer, or not as it should; one sentence."""


class NonFiniteActivation(StoreError):
    """A value that its encoding cannot hold: not finite, or beyond a float's range.

    Attributes:
        channel: index of the channel (of the feature, for vectors).
    """

    def __init__(self, channel: int, value: float, encoding: str) -> None:
        super().__init__(
            f"channel {channel} holds {value}, which {encoding} cannot store; "
            "look at what produced it before writing the store again"
        )
        self.channel = channel
