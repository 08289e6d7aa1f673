"""Draws docs/demo.svg: a terminal of 80 columns, run by tmux, while the demo trains.

.venv/bin/python benchmarks/demo_picture.py --to docs/demo.svg
"""

import argparse
import io
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH, HEIGHT = 80, 18
COMMAND = "greedy train --recipe demo"
MOMENT = "stage 6/8 conv128: epoch 12/16"
TITLE = "greedy"


def tmux(socket: str, *words: str) -> str:
    result = subprocess.run(["tmux", "-S", socket, *words], check=True, stdout=subprocess.PIPE)
    return result.stdout.decode()


def terminal_at(moment: str, socket: str, place: str) -> str:
    """Runs ``COMMAND`` in a terminal. Returns its text, with escape sequences, when it shows
    ``moment``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = f"env PATH={shlex.quote(path)} PS1='$ ' NO_COLOR= sh"
    tmux(
        socket,
        "-f",
        "/dev/null",
        "new-session",
        "-d",
        "-x",
        str(WIDTH),
        "-y",
        str(HEIGHT),
        "-c",
        place,
        shell,
    )
    try:
        tmux(socket, "send-keys", COMMAND, "Enter")
        while True:
            shown = tmux(socket, "capture-pane", "-e", "-p")
            if moment in shown:
                return shown
            assert "test error" not in shown and "Error" not in shown, f"it is over:\n{shown}"
            time.sleep(0.05)
    finally:
        tmux(socket, "kill-server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="the SVG file")
    to = parser.parse_args().to
    with tempfile.TemporaryDirectory() as place:
        shown = terminal_at(MOMENT, f"{place}/socket", place)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown.rstrip()))
    console.save_svg(str(to), title=TITLE, unique_id="demo")


if __name__ == "__main__":
    main()
