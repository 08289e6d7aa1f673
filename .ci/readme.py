"""Runs what README.md says under "Your own images", word for word, in a fresh clone.

To be called by the Python of a .venv that `make install` or `make test` has made.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from greedy.data import load_dataset

ROOT = Path(__file__).resolve().parent.parent
CLASSES = "Trouser", "Sneaker", "Bag"
EACH = 20  # photos
MODES = ("RGB", "jpg"), ("L", "jpg"), ("RGBA", "png")


def blocks(text: str) -> list[str]:
    """The shell commands of the section, a block an entry."""
    (section,) = re.findall(r"^## Your own images\n(.*?)^## ", text, re.M | re.S)
    found = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    assert found, "the section has no commands"
    return found


def commands(script: str) -> list[str]:
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def take_photos(place: Path) -> None:
    """What the user has: photos of several sizes and kinds by class, and a bag not among them."""
    split = load_dataset("fashion-mnist-sample")
    images, labels = split.train.read(np.arange(len(split.train)))
    assert split.class_names is not None
    for name in CLASSES:
        rows = np.flatnonzero(labels == split.class_names.index(name))[: EACH + 1]
        (place / "photos" / name).mkdir(parents=True)
        for i, row in enumerate(rows[:-1]):
            mode, suffix = MODES[i % len(MODES)]
            photo = Image.fromarray(images[row, 0]).convert(mode).resize((100 + 5 * i, 120))
            photo.save(place / "photos" / name / f"{i:02}.{suffix}")
    Image.fromarray(images[rows[-1], 0]).resize((200, 240)).save(place / "new.jpg")


def borrow_packages(clone: Path) -> None:
    """An environment for the clone in which what it needs is already found: the same packages,
    without minutes of unpacking. greedy itself is not taken from there: the clone installs its
    own, which comes first."""
    subprocess.run([sys.executable, "-m", "venv", clone / ".venv"], check=True)
    (own,) = (clone / ".venv").glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        clone = Path(directory) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        script = "".join(blocks((clone / "README.md").read_text()))
        assert len(commands(script)) <= 4, f"more than four commands:\n{script}"
        take_photos(clone)
        borrow_packages(clone)
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=clone,
            env=clean,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(done.stdout)
        installed = list((clone / ".venv").glob("lib/python*/site-packages/greedy/__init__.py"))
    assert done.returncode == 0, f"exit code {done.returncode}"
    assert installed, "the clone did not install its own greedy"
    assert re.search(r"^test error [\d.]+ % on 12 images$", done.stdout, re.M), "no test error"
    assert re.search(r"^new\.jpg +Bag +\d", done.stdout, re.M), "the bag is not found to be one"


if __name__ == "__main__":
    main()
