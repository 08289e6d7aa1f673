"""Export a trained network and use it without greedy: plain PyTorch and ONNX Runtime.

Trains a small network, writes it as safetensors, torch.export's program and ONNX, and in another
process, which never imports greedy, loads each file and compares its logits with the trainer's.
Needs `pip install '.[onnx]'`, in the checkout.

    python examples/deployed.py --run runs/deployed --to deployed
"""

import json
import subprocess
import sys
from pathlib import Path

import click
import safetensors.torch
import torch
from torch import Tensor, nn


def train_and_export(run: Path, to: Path, epochs: int) -> None:
    import greedy  # noqa: PLC0415  # the other process does without
    from greedy.results.export import FORMATS, export  # noqa: PLC0415

    settings = [f"training.epochs={epochs}", "model.feature_multiplier=0.05"]
    trainer = greedy.GreedyTrainer.from_recipe(greedy.recipes.load("demo", settings), run)
    trainer.prepare(data := greedy.data.load_dataset("fashion-mnist-sample"))
    trainer.train()
    to.mkdir(parents=True)
    for format, suffix in FORMATS.items():
        export(trainer.run, trainer.loss, None, to / f"network{suffix}", format)
    images = torch.from_numpy(data.test.read(range(100))[0]).float() / 255
    expected = {"images": images, "logits": trainer.assemble()(images)}
    safetensors.torch.save_file(expected, to / "expected.safetensors")


def from_safetensors(file: Path, images: Tensor) -> Tensor:
    with safetensors.safe_open(file, "pt") as opened:
        modules = json.loads(opened.metadata()["modules"])
    network = nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in modules))
    network.load_state_dict(safetensors.torch.load_file(file))
    return network.eval()(images)


def from_torch_export(file: Path, images: Tensor) -> Tensor:
    return torch.export.load(file).module()(images)


def from_onnx(file: Path, images: Tensor) -> Tensor:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default="runs/deployed")
@click.option("--to", type=click.Path(path_type=Path), default="deployed", show_default=True)
@click.option("--epochs", default=3, show_default=True, help="Of each stage.")
@click.option("--compare", is_flag=True, help="Only compare: what the other process does.")
def main(run: Path, to: Path, epochs: int, compare: bool) -> None:
    if not compare:
        if to.exists():
            raise click.UsageError(f"{to} exists already: give another --to")
        train_and_export(run, to, epochs)
        subprocess.run([sys.executable, __file__, "--to", to, "--compare"], check=True)
        return
    loaders = {".safetensors": from_safetensors, ".pt2": from_torch_export, ".onnx": from_onnx}
    expected = safetensors.torch.load_file(to / "expected.safetensors")
    for suffix, load in loaders.items():
        off = (load(to / f"network{suffix}", expected["images"]) - expected["logits"]).abs().max()
        assert off < 1e-4 and "greedy" not in sys.modules
        print(f"network{suffix}: the same logits, {off:.1g} apart at most")


if __name__ == "__main__":
    main()
