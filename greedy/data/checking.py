"""The check of all files of an image folder, before any of them is trained on."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from greedy.base.errors import UserError
from greedy.base.text import first_names, sides
from greedy.data.folder import FolderSplit
from greedy.data.images import UnreadableImage, open_image
from greedy.data.listing import first_paths
from greedy.data.modes import KINDS
from greedy.data.splits import Dataset

BATCH = 1024  # files that are given to the threads at a time

Problem = Literal["unreadable", "other kind", "other size", "animated"]
Progress = Callable[[int, int], None]


def check_files(
    dataset: Dataset, *, skip: bool = False, progress: Progress = lambda done, files: None
) -> Dataset:
    """Decodes all files of an image folder, in parallel, and returns the data set; other data sets
    are returned unchanged.

    Args:
        skip: leave out files that cannot be read, and list them in ``Dataset.skipped``.
        progress: called with the number of files decoded and the number of all.

    Raises ``UserError`` that names all unreadable files, or counts those that differ from the first
    in size or kind.
    """
    train, test = dataset.train, dataset.test
    if not (isinstance(train, FolderSplit) and isinstance(test, FolderSplit)):
        return dataset
    problems: dict[Problem, dict[Path, str]] = {}
    done, files = 0, len(train) + len(test)
    for split in (train, test):
        for file, problem, details in _checked_files(split):
            done += 1
            if problem is not None:
                problems.setdefault(problem, {})[file] = details
            progress(done, files)
    unreadable = problems.pop("unreadable", {})
    if unreadable and not skip:
        raise UserError(
            f"{len(unreadable):,} of {files:,} images of {train.root} cannot be read: "
            f"{_all(unreadable, train.root)}; replace or remove them, or set data.broken=skip to "
            f"leave them out"
        )
    _require_alike(train, problems)
    notes = list(dataset.notes)
    if animated := problems.get("animated"):
        named = first_paths([*animated], train.root)
        notes.append(f"images of which the first of several is used: {len(animated):,} ({named})")
    if not unreadable:
        return replace(dataset, notes=notes)
    notes.append(
        f"images left out since they cannot be read: {len(unreadable):,} "
        f"({_all(unreadable, train.root)})"
    )
    skipped = {str(file.relative_to(train.root)): why for file, why in unreadable.items()}
    train, test = train.without(unreadable), test.without(unreadable)
    _require_all_classes(train, dataset.class_names or [])
    return replace(dataset, train=train, test=test, notes=notes, skipped=skipped)


def _checked_files(split: FolderSplit) -> Iterator[tuple[Path, Problem | None, str]]:
    """Yields the files of a split in order, each with its problem, None for none, and details."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(split), BATCH):
            files = split.files[start : start + BATCH]
            checks = pool.map(partial(_check, split), files)
            for file, (problem, details) in zip(files, checks, strict=True):
                yield file, problem, details


def _check(split: FolderSplit, file: Path) -> tuple[Problem | None, str]:
    try:
        with open_image(file, split.reading) as image:
            if image.kind != split.first.kind:
                return "other kind", KINDS[image.kind]
            if not split.first.resized and image.size != split.first.size:
                return "other size", sides(image.size)
            return ("animated" if image.animated else None), ""
    except UnreadableImage as error:
        return "unreadable", error.reason


def _require_alike(split: FolderSplit, problems: Mapping[Problem, dict[Path, str]]) -> None:
    first, size = split.first, sides(split.first.size)
    named = first.file.relative_to(split.root)
    if others := problems.get("other kind"):
        raise UserError(
            f"{len(others):,} images of {split.root} do not hold {KINDS[first.kind]} as {named} "
            f"does: {_few(others, split.root)}; bring all images to one kind, since different "
            f"kinds have no scale in common"
        )
    if others := problems.get("other size"):
        raise UserError(
            f"{len(others):,} images of {split.root} are not of {size} pixels as {named} is: "
            f"{_few(others, split.root)}; set data.image_size to bring all images to one size"
        )


def _require_all_classes(train: FolderSplit, class_names: list[str]) -> None:
    present = {int(label) for label in train.labels}
    if lost := [name for number, name in enumerate(class_names) if number not in present]:
        raise UserError(
            f"no training image of {', '.join(map(repr, lost))} can be read: replace some, or "
            f"remove the class"
        )


def _all(files: Mapping[Path, str], root: Path) -> str:
    return ", ".join(_described(files, root))


def _few(files: Mapping[Path, str], root: Path) -> str:
    return first_names(_described(files, root))


def _described(files: Mapping[Path, str], root: Path) -> list[str]:
    return [f"{file.relative_to(root)} ({details})" for file, details in files.items()]
