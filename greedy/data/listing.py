"""The image files of a folder: found below class folders, by what Pillow reads."""

import os
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFile

from greedy.base.text import listed

SILENT = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what systems leave behind
WITHOUT_PICTURES = {"MPEG"}  # formats that Pillow knows and cannot decode


def suffixes() -> set[str]:
    """Returns the suffixes, in small letters, of the files that Pillow, with the plugins that are
    registered, decodes."""
    Image.init()
    formats = {"MPO"} | {  # read by the reader of JPEG
        name
        for name, (reader, _) in Image.OPEN.items()
        if name not in WITHOUT_PICTURES
        and not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))
    }
    return {end.lower() for end, name in Image.registered_extensions().items() if name in formats}


@dataclass
class Listing:
    """Image files below folders.

    Attributes:
        ignored: what is no image file, as it was met.
    """

    ignored: list[Path] = field(default_factory=list)
    _suffixes: set[str] = field(default_factory=suffixes)

    def classes(self, folder: Path) -> dict[str, list[Path]]:
        """Returns the image files below each folder in ``folder``, of links too, by the names of
        these folders in the order of these; those whose names are equal but for Unicode
        normalisation are one class."""
        found: dict[str, list[Path]] = {}
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                if entry.name not in SILENT:
                    name = unicodedata.normalize("NFC", entry.name)
                    found.setdefault(name, []).extend(self.below(entry))
            else:
                self.ignore(entry)
        return {name: sorted(found[name]) for name in sorted(found)}

    def below(self, folder: Path) -> list[Path]:
        """Returns the image files in a folder and the folders in it, sorted. A folder that links
        lead to again is looked at once, and one that holds ``folder``, with other classes, never.
        """
        found: list[Path] = []
        holding = (*folder.absolute().parents, *folder.resolve().parents)
        seen = {(status.st_dev, status.st_ino) for status in map(Path.stat, holding)}
        for place, folders, names in os.walk(folder, followlinks=True, onerror=_raised):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            hidden = [name for name in folders if name.startswith(".") or name in SILENT]
            folders[:] = [name for name in folders if name not in hidden]
            for file in (Path(place, name) for name in (*names, *hidden)):
                if self.is_image(file):
                    found.append(file)
                else:
                    self.ignore(file)
        return sorted(found)

    def is_image(self, file: Path) -> bool:
        """Whether a file is called as images are, and is a file or a link that leads nowhere."""
        if file.name.startswith(".") or file.suffix.lower() not in self._suffixes:
            return False
        try:
            return stat.S_ISREG(file.stat().st_mode)
        except OSError:
            return True  # named where it is read

    def has_images(self, folder: Path) -> bool:
        """Whether there is an image file in a folder itself."""
        return any(self.is_image(file) for file in folder.iterdir())

    def has_folders(self, folder: Path) -> bool:
        """Whether there is a folder in a folder that may be a class."""
        return any(
            each.is_dir() and not each.name.startswith(".") and each.name not in SILENT
            for each in folder.iterdir()
        )

    def ignore(self, path: Path) -> None:
        """Notes what is no image file, unless systems leave it behind everywhere."""
        if path.name not in SILENT and path.name != ".DS_Store" and not path.name.startswith("._"):
            self.ignored.append(path)


def _raised(error: OSError) -> None:
    """What ``os.walk`` calls; without it, folders that cannot be opened count as empty."""
    raise error


def few(paths: list[Path], root: Path) -> str:
    """The first three of some paths, as they are below ``root``."""
    return listed([path.relative_to(root) for path in sorted(paths)])
