"""All files of an image folder looked at, before any of them is trained on."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from greedy.base.errors import UserError
from greedy.base.text import listed
from greedy.data.folder import FolderSplit
from greedy.data.images import UnreadableImage, opened
from greedy.data.listing import few
from greedy.data.modes import KINDS
from greedy.data.splits import Dataset

TOGETHER = 1024  # files that are given to the threads at a time

Finding = Literal["unreadable", "other kind", "other size", "animated"]
Progress = Callable[[int, int], None]


def checked(
    dataset: Dataset, *, skip: bool = False, progress: Progress = lambda done, files: None
) -> Dataset:
    """Decodes all files of an image folder, in parallel, and returns the data set; others are
    returned as they are. ``progress`` hears how many of how many files are done. With ``skip``
    files that cannot be read are left out, and are in ``Dataset.skipped``.

    Raises UserError that names all files that cannot be read, or counts those that are not like
    the first in size or kind.
    """
    train, test = dataset.train, dataset.test
    if not (isinstance(train, FolderSplit) and isinstance(test, FolderSplit)):
        return dataset
    found: dict[Finding, dict[Path, str]] = {}
    done, files = 0, len(train) + len(test)
    for split in (train, test):
        for file, finding, what in _looked_at(split):
            done += 1
            if finding is not None:
                found.setdefault(finding, {})[file] = what
            progress(done, files)
    unreadable = found.pop("unreadable", {})
    if unreadable and not skip:
        raise UserError(
            f"{len(unreadable):,} of {files:,} images of {train.root} cannot be read: "
            f"{_all(unreadable, train.root)}; replace or remove them, or set data.broken=skip to "
            f"leave them out"
        )
    _require_alike(train, found)
    notes = list(dataset.notes)
    if animated := found.get("animated"):
        named = few([*animated], train.root)
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


def _looked_at(split: FolderSplit) -> Iterator[tuple[Path, Finding | None, str]]:
    """The files of a split in their order, with what is found about them."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(split), TOGETHER):
            files = split.files[start : start + TOGETHER]
            looks = pool.map(partial(_look, split), files)
            for file, (finding, what) in zip(files, looks, strict=True):
                yield file, finding, what


def _look(split: FolderSplit, file: Path) -> tuple[Finding | None, str]:
    try:
        with opened(file, split.reading) as image:
            if image.kind != split.first.kind:
                return "other kind", KINDS[image.kind]
            if not split.first.resized and image.size != split.first.size:
                return "other size", "x".join(map(str, image.size))
            return ("animated" if image.animated else None), ""
    except UnreadableImage as error:
        return "unreadable", error.reason


def _require_alike(split: FolderSplit, found: Mapping[Finding, dict[Path, str]]) -> None:
    first, size = split.first, "x".join(map(str, split.first.size))
    named = first.file.relative_to(split.root)
    if others := found.get("other kind"):
        raise UserError(
            f"{len(others):,} images of {split.root} do not hold {KINDS[first.kind]} as {named} "
            f"does: {_few(others, split.root)}; bring all images to one kind, since different "
            f"kinds have no scale in common"
        )
    if others := found.get("other size"):
        raise UserError(
            f"{len(others):,} images of {split.root} are not of {size} pixels as {named} is: "
            f"{_few(others, split.root)}; set data.image_size to bring all images to one size"
        )


def _require_all_classes(train: FolderSplit, class_names: list[str]) -> None:
    there = {int(label) for label in train.labels}
    if lost := [name for number, name in enumerate(class_names) if number not in there]:
        raise UserError(
            f"no training image of {', '.join(map(repr, lost))} can be read: replace some, or "
            f"remove the class"
        )


def _all(files: Mapping[Path, str], root: Path) -> str:
    return ", ".join(_told(files, root))


def _few(files: Mapping[Path, str], root: Path) -> str:
    return listed(_told(files, root))


def _told(files: Mapping[Path, str], root: Path) -> list[str]:
    return [f"{file.relative_to(root)} ({what})" for file, what in files.items()]
