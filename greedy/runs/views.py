"""How many augmented copies of the training rows a stage trains on, and for how long on each."""

from typing import Literal

from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage

Views = int | Literal["live"]

SPREAD = 4  # views, over which the uses of a copy are spread in time


def harmless_uses(epochs: int) -> int:
    """Returns how often a stage that trains for ``epochs`` may use a copy of a row. Five uses did
    no harm in 20 epochs, but did in 60 and in 200; two did none. Between these,
    (uses - 1) x epochs is at most 100; ``docs/concepts/views.md`` has the measurements."""
    return min(max(1 + 100 // epochs, 2), 5)


def enough_views(
    epochs: int, views: int | None = None, reuse: int | None = None
) -> tuple[int, int]:
    """Returns how many views a stage trains on, and after how many epochs the oldest is replaced, 0
    for never. What that costs in accuracy is measured in ``docs/concepts/views.md``.

    Args:
        epochs: of the stage that trains on them.
        views: if their number is given.
        reuse: if that is given.
    """
    uses = harmless_uses(epochs)
    needed = -(-epochs // uses)
    if views is None:
        views = needed if reuse == 0 else min(needed, SPREAD)
    if reuse is None:
        reuse = uses if needed > views else 0
    return views, reuse if reuse < epochs else 0


def is_drawn_from_images(views: int, reuse: int, source_views: int, source_reuse: int) -> bool:
    """Returns whether the first views of a store are computed from the images instead of the store
    of its source: where views of either are replaced, or the source has fewer."""
    return reuse > 0 or source_reuse > 0 or source_views < views


def view_numbers(epoch: int, views: int, reuse: int) -> list[int]:
    """Returns the number of the view in each place of a store in an epoch, counted from 0. Each
    view is drawn by its number; one with number g is in place g modulo ``views``. After every
    ``reuse`` epochs the oldest makes room for the next."""
    oldest = epoch // reuse if reuse else 0
    return [oldest + (place - oldest) % views for place in range(views)]


def views_drawn(epochs: int, reuse: int) -> int:
    """Returns how many views are drawn while a stage trains, besides those it begins with."""
    return (epochs - 1) // reuse if reuse else 0


def wanted_views(recipe: Recipe, number: int, *, fresh: bool = False) -> tuple[Views, int]:
    """Returns the views of the store that stage ``number`` trains from, and after how many epochs
    the oldest is replaced, if the disk has room. Frozen stages draw nothing at random: without
    augmentation, or images that a data set draws afresh, all views would be equal, and one is
    enough."""
    store = recipe.store
    if store.views == "live":
        return "live", 0
    if not (recipe.data.is_augmented or fresh):
        return 1, 0
    given = (None if value == "auto" else value for value in (store.views, store.reuse))
    return enough_views(for_stage(recipe.training.epochs, number), *given)
