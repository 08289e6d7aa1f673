"""The recipes of ImageNet: a folder of photographs, and a plan without it."""

from pathlib import Path

import pytest
from command_line import answer, said
from pictures import write_image

CLASSES = [f"n{number:08d}" for number in range(12)]
SMALL = [
    *("--set", "data.image_size=32", "--set", "training.epochs=1", "--set", "loss.name=pred"),
    *("--set", "loss.pred_pool_target=64", "--set", "training.batch_size=24"),
    *("--set", "model.stage_layers=6", "--device", "cpu", "--precision", "float32"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of small JPEG files of several sizes and modes."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, each in (("train", 4), ("val", 1)):
        for number, name in enumerate(CLASSES):
            for image in range(each):
                mode = "L" if (number + image) % 5 == 0 else "RGB"
                write_image(folder / split / name / f"{image}.JPEG", 40 + number, 48, mode)
    return folder


def test_resnet50_is_trained_from_a_folder(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = ["--recipe", "imagenet/resnet50-predsim", "--data", f"folder:{photos}"]
    said("train", *recipe, "--run", run, *SMALL)
    stages = answer("status", "--run", run)["stages"]
    assert len(stages) == 3 + 1  # stem and 16 blocks in sixes, and the output layer
    assert all(stage["state"] == "complete" for stage in stages)
    file = photos / "val" / CLASSES[3] / "0.JPEG"
    (predicted,) = answer("predict", "--run", run, file, "--top", 2)["predictions"]
    assert {found["class"] for found in predicted["classes"]} < {*CLASSES}


def test_all_of_imagenet_is_planned_without_it() -> None:
    plan = answer(
        *("plan", "--recipe", "imagenet/resnet50-predsim", "--device", "cuda"),
        *("--images", 1_281_167, 50_000, "--classes", 1_000, "--disk-budget", "400GiB"),
        *("--set", "model.stage_layers=9"),  # counted in less time than 18 stages
    )
    assert len(plan["stages"]) == 3
    images = (1_281_167 + 50_000) * 3 * 224 * 224
    assert images < plan["disk"]["peak_bytes"] <= 400 * 2**30
    assert 2**30 < plan["peak_memory_bytes"] < plan["baselines"]["backprop"]
