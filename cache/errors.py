"""What can be wrong with a store."""

ADVICE = "write the store again"


class StoreError(Exception):
    """A store cannot be written or read as asked; one sentence."""


class DamagedStore(StoreError):
    """A file of a store is missing or does not hold what was written.

    Attributes:
        what: the file or chunk, and what is wrong with it.
    """

    def __init__(self, what: str, advice: str = ADVICE) -> None:
        what = what.removesuffix(f"; {ADVICE}")
        super().__init__(f"{what}; {advice}")
        self.what = what


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
