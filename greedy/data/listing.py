"""The image files of a folder: those below class folders that Pillow can read."""

import os
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFile

from greedy.base.text import first_names

SYSTEM_FILES = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # created by operating systems
WITHOUT_PICTURES = {"MPEG"}  # formats that Pillow recognises but cannot decode


def suffixes() -> set[str]:
    """Returns the lower-case suffixes of the files that Pillow decodes with the registered
    plugins."""
    Image.init()
    formats = {"MPO"} | {  # read as JPEG
        name
        for name, (reader, _) in Image.OPEN.items()
        if name not in WITHOUT_PICTURES
        and not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))
    }
    return {end.lower() for end, name in Image.registered_extensions().items() if name in formats}


@dataclass
class Listing:
    """A search for image files below folders.

    Attributes:
        ignored: the files that are no images, in the order they were met.
    """

    ignored: list[Path] = field(default_factory=list)
    _suffixes: set[str] = field(default_factory=suffixes)

    def classes(self, folder: Path) -> dict[str, list[Path]]:
        """Returns the image files below each folder in ``folder``, links included, by the folders'
        sorted names. Names that are equal after Unicode normalisation are one class."""
        files: dict[str, list[Path]] = {}
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                if entry.name not in SYSTEM_FILES:
                    name = unicodedata.normalize("NFC", entry.name)
                    files.setdefault(name, []).extend(self.below(entry))
            else:
                self.ignore(entry)
        return {name: sorted(files[name]) for name in sorted(files)}

    def below(self, folder: Path) -> list[Path]:
        """Returns the sorted image files in a folder and its subfolders. A folder that links lead
        to repeatedly is searched once, and one that contains ``folder``, with other classes,
        never."""
        images: list[Path] = []
        containing = (*folder.absolute().parents, *folder.resolve().parents)
        seen = {(status.st_dev, status.st_ino) for status in map(Path.stat, containing)}
        for path, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            hidden = [name for name in folders if name.startswith(".") or name in SYSTEM_FILES]
            folders[:] = [name for name in folders if name not in hidden]
            for file in (Path(path, name) for name in (*names, *hidden)):
                if self.is_image(file):
                    images.append(file)
                else:
                    self.ignore(file)
        return sorted(images)

    def is_image(self, file: Path) -> bool:
        """Returns whether a file's name has an image's suffix and it is a regular file or a broken
        link."""
        if file.name.startswith(".") or file.suffix.lower() not in self._suffixes:
            return False
        try:
            return stat.S_ISREG(file.stat().st_mode)
        except OSError:
            return True  # reading it gives an error that names it

    def has_images(self, folder: Path) -> bool:
        """Returns whether a folder directly holds an image file."""
        return any(self.is_image(file) for file in folder.iterdir())

    def has_folders(self, folder: Path) -> bool:
        """Returns whether a folder directly holds a folder that may be a class."""
        return any(
            entry.is_dir() and not entry.name.startswith(".") and entry.name not in SYSTEM_FILES
            for entry in folder.iterdir()
        )

    def ignore(self, path: Path) -> None:
        """Records a file that is no image, unless it is one that operating systems create
        everywhere."""
        if (
            path.name not in SYSTEM_FILES
            and path.name != ".DS_Store"
            and not path.name.startswith("._")
        ):
            self.ignored.append(path)


def _raise(error: OSError) -> None:
    """Raises the error that ``os.walk`` meets; it would otherwise treat a folder that cannot be
    opened as empty."""
    raise error


def first_paths(paths: list[Path], root: Path) -> str:
    """Returns the first three of some paths, relative to ``root``."""
    return first_names([path.relative_to(root) for path in sorted(paths)])
