"""The biologically plausible losses: compared with published values, and their special
properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interrupting import StopAfter
from published import CLASSES, GOLDEN, OURS, Block, assert_golden
from safetensors.torch import load_file
from small_training import TEST, TRAIN, new_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter, UserError, recipes
from greedy.base.errors import Interrupted
from greedy.build.modules import build_loss, loss_settings
from greedy.losses import LocalLoss, Pred, PredBio, PredSim, PredSimBio, Sim, SimBio
from greedy.memory.choice import fused_adam
from greedy.memory.peaks import StepDemand
from greedy.models import cut, mlp, shapes, vgg8b
from greedy.recipes import Loss
from greedy.results.evaluation import evaluate
from greedy.runs.choices import StepMemory

LOSSES = {
    "pred-bio": (PredBio(pool_target=64, target_projection=16), nn.ReLU),
    "sim-bio": (SimBio(pool_target=64, target_projection=16), nn.LeakyReLU),
    "predsim-bio": (PredSimBio(0.01, pool_target=64, target_projection=16), nn.LeakyReLU),
}
UNUSED = "conv_loss.weight"  # published with sim-bio on feature maps, without effect
ACCURACY = 1e-4


def one_hot(labels: Tensor, classes: int = CLASSES) -> Tensor:
    return F.one_hot(labels, classes).float()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_published_ones(kind: str, name: str) -> None:
    def golden(key: str) -> np.ndarray:
        return GOLDEN[f"{kind}/{name}/{key}"]

    prefix = f"{kind}/{name}/param/"
    published = {k.removeprefix(prefix) for k in GOLDEN.files if k.startswith(prefix)} - {UNUSED}
    loss, activation = LOSSES[name]
    block = Block(kind, loss, activation)
    counted = {k for k in block.state_dict() if "running" not in k and "num_batches" not in k}
    assert {OURS[k] for k in published} == counted
    tensors = {OURS[k]: torch.from_numpy(golden(f"param/{k}")) for k in published}
    block.load_state_dict(tensors, strict=False)

    x = torch.from_numpy(golden("x")).requires_grad_()
    targets = block.heads.targets(one_hot(torch.from_numpy(golden("y"))))
    value = loss(block.heads(block.layer(x)), targets)
    value.backward()

    assert_golden(value, golden("loss"), ACCURACY)
    assert_golden(x.grad, golden("grad/x"), ACCURACY)
    gradients = {k: p.grad for k, p in block.named_parameters()}
    assert {OURS[k] for k in published if f"{prefix[:-6]}grad/{k}" in GOLDEN.files} == set(
        gradients
    )
    for key in published:
        if key == "encoder.bias":  # batch norm cancels it: rounding is all there is
            assert gradients[OURS[key]].abs().max() < 1e-5
        elif OURS[key] in gradients:
            assert_golden(gradients[OURS[key]], golden(f"grad/{key}"), ACCURACY)


@pytest.mark.parametrize("shape", [(20,), (8, 7, 7)])
def test_the_error_goes_back_through_the_fixed_matrix(shape: tuple[int, ...]) -> None:
    loss = PredBio(pool_target=64, target_projection=16)
    heads = loss.heads(shape, CLASSES)
    h = torch.randn(9, *shape, requires_grad=True)
    slope = torch.randn(9, 16)  # dL/dlogits

    def carried(weight: float) -> Tensor:
        nn.init.normal_(heads.prediction.classifier.weight, std=weight)
        h.grad = None
        heads(h).p.backward(slope)
        return h.grad

    pooled = h if len(shape) == 1 else heads.prediction.pool(h)
    expected = torch.autograd.grad(
        pooled, h, (slope @ heads.prediction.feedback).reshape_as(pooled)
    )
    torch.testing.assert_close(carried(1.0), expected[0])
    assert torch.equal(carried(1.0), carried(100.0))
    assert heads.prediction.classifier.weight.grad is not None
    assert not heads.prediction.feedback.requires_grad


def test_both_losses_of_a_layer_aim_at_the_same_fixed_projection() -> None:
    heads = PredSimBio(target_projection=16).heads((20,), CLASSES)
    y = one_hot(torch.arange(9) % CLASSES)
    assert torch.equal(heads.targets(y), heads.projection[:, torch.arange(9) % CLASSES].T)
    assert [name for name, _ in heads.named_buffers()] == ["projection", "prediction.feedback"]
    assert heads.projection.abs().max() <= 1 / CLASSES**0.5
    assert heads.prediction.feedback.abs().max() <= 1 / 20**0.5
    for parameter in heads.parameters():
        assert torch.all(parameter == 0)


def test_the_local_classifier_names_the_most_likely_class() -> None:
    heads = PredBio(target_projection=16).heads((20,), CLASSES)
    nn.init.normal_(heads.prediction.classifier.weight)
    h = torch.randn(50, 20)
    features = heads(h)
    codes = (heads.projection.T > 0).float()  # one a class
    each = features.p[:, None].expand(-1, CLASSES, -1)
    loss = F.binary_cross_entropy_with_logits(each, codes.expand_as(each), reduction="none")
    posterior = torch.softmax(-loss.sum(dim=2), dim=1)
    torch.testing.assert_close(torch.softmax(heads.logits(features), dim=1), posterior)
    early_exit = nn.Sequential(*heads.modules_for_inference())
    torch.testing.assert_close(early_exit(h), heads.logits(features))


def test_features_are_float32_under_autocast() -> None:
    heads = PredSimBio().heads((8, 4, 4), num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        features = heads(torch.randn(5, 8, 4, 4))
    assert features.z.dtype == features.p.dtype == torch.float32


def test_the_projection_counts_as_memory() -> None:
    (stage, _), rows = cut(mlp(1, 4, CLASSES, hidden_layers=1, hidden_width=20)), 8

    def demand(width: int) -> StepDemand:
        what = (stage, shapes([stage], (1, 4, 4))[0], SimBio(target_projection=width), CLASSES)
        return StepDemand(*what, rows, "float32", fused_adam, "cpu", stored_row_bytes=16)

    wide, narrow = demand(50_000), demand(10_000)
    more = 4 * 40_000 * CLASSES
    assert wide.writing_peak(rows) - narrow.writing_peak(rows) == more
    assert wide.peak(StepMemory()) - narrow.peak(StepMemory()) >= more + 4 * 40_000 * rows


@pytest.mark.parametrize(
    "loss",
    [
        Pred(7, 2),
        Sim(),
        PredSim(0.5, 7, 2),
        PredBio(7, 9),
        SimBio(7, 9),
        PredSimBio(0.5, 7, 9),
    ],
)
def test_a_recipe_says_all_of_a_loss(loss: LocalLoss) -> None:
    assert build_loss(Loss(**loss_settings(loss))) == loss


def test_predsim_bio_has_a_beta_of_its_own_and_no_hidden_layers() -> None:
    assert recipes.load("demo", ["loss.name=predsim-bio"]).loss.beta == 0.01
    assert recipes.load("demo", ["loss.name=predsim-bio", "loss.beta=0.5"]).loss.beta == 0.5
    assert recipes.load("demo", ["loss.name=predsim"]).loss.beta == 0.99
    assert [PredSimBio().output_scale, PredSimBio(0.3).output_scale] == [0.99, 0.7]
    with pytest.raises(UserError, match="pred_hidden_layers is 1 but must be 0 where loss.name is"):
        recipes.load("demo", ["loss.name=pred-bio", "loss.pred_hidden_layers=1"])


# A run


def bio_trainer(run: Path, loss: LocalLoss, reporter: Reporter | None = None) -> GreedyTrainer:
    exact = {"views": 1, "encoding": "float32"}
    return new_trainer(run, loss=loss, reporter=reporter, epochs=6, **exact)


@pytest.mark.parametrize("loss", [PredBio(), SimBio(), PredSimBio(0.5)])
def test_a_run_learns_and_is_stopped_resumed_and_evaluated(tmp_path: Path, loss: LocalLoss) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    records = bio_trainer(whole, loss).fit(TRAIN, TEST)
    with pytest.raises(Interrupted, match="in stage 1 after step"):
        bio_trainer(cut, loss, StopAfter(17)).fit(TRAIN, TEST)
    trainer = bio_trainer(cut, loss)
    trainer.fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        for name in ("encoder", "heads"):
            one, other = (
                load_file(run / f"stage{stage}/{name}.safetensors") for run in (whole, cut)
            )
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        documents = [
            json.loads((run / f"stage{stage}/stage.json").read_text()) for run in (whole, cut)
        ]
        assert documents[0]["metrics"] == documents[1]["metrics"]
    assert "projection" in load_file(cut / "stage1/heads.safetensors")

    errors = [record.metrics.test_error_percent for record in records]
    assert errors[-1] < 33  # chance is 67
    for number in (1, 2):
        if isinstance(loss, SimBio):
            assert errors[number - 1] is None
            with pytest.raises(UserError, match=f"stage {number} has no local classifier"):
                trainer.assemble(number)
        else:
            network = trainer.assemble(number)
            assert all(type(module) is getattr(nn, type(module).__name__) for module in network)
            figures = evaluate(trainer.run, network, "test", torch.device("cpu"))
            assert figures.error_percent == pytest.approx(errors[number - 1], abs=3)
            assert errors[number - 1] < 33


@pytest.mark.slow
def test_feature_maps_train_in_every_mode(tmp_path: Path) -> None:
    """The smaller budget allows no plain step."""

    def trained(name: str, budget: str) -> tuple[set[str], float | None]:
        torch.manual_seed(0)
        trainer = new_trainer(
            tmp_path / name,
            vgg8b(1, 16, 3, feature_multiplier=0.1, hidden_width=16),
            loss=PredSimBio(0.5, pool_target=64),
            epochs=1,
            batch_size=64,
            views=1,
            memory_budget=budget,
        )
        images, labels = (tensor[:128] for tensor in TRAIN.tensors)
        data = TensorDataset(F.interpolate(images.float(), 16).byte(), labels)
        records = trainer.fit(data, data)
        return {r.choices.memory_mode for r in records}, records[0].metrics.train_loss

    modes, loss = trained("large", "1GiB")
    assert modes == {"plain"}
    fewer, same = trained("small", "2MiB")
    assert fewer - modes
    assert same == pytest.approx(loss, rel=1e-3)
