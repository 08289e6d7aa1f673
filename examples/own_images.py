"""Train on your own images, through the Python API.

The images lie as torchvision's ImageFolder takes them: `train/CLASS/IMAGE` and `test/CLASS/IMAGE`.
Here a small such folder is made of the sample that ships with greedy, unless it is there.

    python examples/own_images.py --images own-images --run runs/own-images
"""

from pathlib import Path

import click
import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

import greedy


@click.command()
@click.option("--images", type=click.Path(path_type=Path), default="own-images", show_default=True)
@click.option("--run", type=click.Path(path_type=Path), default="runs/own-images")
@click.option("--epochs", default=5, show_default=True, help="Of each stage.")
def main(images: Path, run: Path, epochs: int) -> None:
    if not images.exists():
        write_sample(images)

    train_set, test_set = ImageFolder(str(images / "train")), ImageFolder(str(images / "test"))
    model = greedy.models.vgg8b(
        in_channels=3,
        image_size=28,
        num_classes=len(train_set.classes),
        feature_multiplier=0.1,
        hidden_width=128,
    )
    trainer = greedy.GreedyTrainer(
        model,
        run_dir=run,
        loss=greedy.losses.PredSim(pool_target=1024),
        augmentation="hflip",
        epochs=epochs,
        batch_size=64,
        learning_rate=5e-3,
    )
    for record in trainer.fit(train_set, test_set):
        error = record.metrics.test_error_percent
        print(f"stage {record.stage}, {record.name}: test error {error:.1f} %")

    pictures = sorted((images / "test").glob("*/*.png"))[::40][:5]
    for prediction in greedy.predict(
        trainer.run, trainer.assemble(), pictures, trainer.device, top=1
    ):
        print(f"{prediction.image}: {prediction.classes[0]} ({prediction.confidences[0]:.0%})")


def write_sample(folder: Path) -> None:
    """Writes 1,200 training and 400 test images of the sample as files."""
    sample = greedy.data.load_dataset("fashion-mnist-sample")
    for name, split, count in (("train", sample.train, 1200), ("test", sample.test, 400)):
        for i, (image, label) in enumerate(zip(*split.read(np.arange(count)), strict=True)):
            place = folder / name / sample.class_names[label].replace("/", " or ")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(place / f"{i}.png")


if __name__ == "__main__":
    main()
