"""The errors a user can cause, or can do something about."""


class UserError(Exception):
    """A mistake in what was asked for: one sentence saying what is wrong and what to do."""
