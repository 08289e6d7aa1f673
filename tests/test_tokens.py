"""Networks whose stages give tokens (T, D): a transformer, and layers on each token."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import answer, said
from interrupting import Listener
from PIL import Image
from small_training import CLASSES, SIDE, TEST, TRAIN, new_trainer, same, weights
from torch import nn

from greedy import UserError, evaluate
from greedy.base.errors import Interrupted
from greedy.cache import Store
from greedy.cache.encodings import fit_encoding
from greedy.losses import Pred, PredictionHead, PredSimBio, feature_deviation
from greedy.losses.similarity import SimilarityHead
from greedy.models import Stage, cut
from greedy.results.export import export
from greedy.results.similarity import similarity_by_stage
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.step import Learner, gradients
from greedy.stores.source import Batch

TOKENS, WIDTH = 16, 8


class Patches(nn.Module):
    """Turns an image into tokens (T, D) with their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.place = nn.Parameter(torch.zeros(TOKENS, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).flatten(2).mT + self.place


class Rows(nn.Module):
    """Turns the rows of a grey image into tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


class Volume(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None]


class ChannelsLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1)


def block(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, **({"batch_first": True} | options))


def transformer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Patches(), block(), block(), nn.Flatten(), nn.Linear(TOKENS * WIDTH, CLASSES)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    records = new_trainer(run, transformer(), epochs=3).fit(TRAIN, TEST)
    assert [each.name for each in records] == ["conv8", "transformer8", "transformer8", "output"]
    return run


# The heads


def test_the_similarity_head_gives_the_deviation_over_tokens() -> None:
    h = torch.randn(5, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(feature_deviation(h), h.std(dim=1))
    gradient, expected = (
        torch.autograd.grad(f.sum(), h) for f in (feature_deviation(h), h.std(dim=1))
    )
    torch.testing.assert_close(gradient, expected)
    head = SimilarityHead((TOKENS, WIDTH)).double()
    torch.testing.assert_close(head(h), (h @ head.transform.weight.T).std(dim=1))
    assert feature_deviation(h[:, :1]).shape == (5, WIDTH)
    assert feature_deviation(h[:, :, :3]).shape == (5, 3 * TOKENS)
    still = torch.ones(2, TOKENS, WIDTH, requires_grad=True)
    feature_deviation(still).sum().backward()
    assert not still.grad.any()


@pytest.mark.parametrize(
    ("target", "pooled"), [(200, 9), (72, 9), (71, 5), (40, 5), (24, 3), (8, 1), (1, 1)]
)
def test_the_prediction_head_averages_neighbouring_tokens(target: int, pooled: int) -> None:
    head = PredictionHead((9, WIDTH), CLASSES, target)
    assert head.classifier.in_features == pooled * WIDTH
    nn.init.normal_(head.classifier.weight)
    h = torch.randn(4, 9, WIDTH)
    size = {9: 1, 5: 2, 3: 4, 1: 9}[pooled]
    means = torch.stack([part.mean(dim=1) for part in h.split(size, dim=1)], dim=1)
    torch.testing.assert_close(head(h), head.classifier(means.flatten(1)))


@pytest.mark.parametrize(
    "loss", [PredSimBio(pool_target=32), Pred(pool_target=32, hidden_layers=1)]
)
def test_other_losses_have_heads_for_tokens(tmp_path: Path, loss) -> None:
    records = new_trainer(tmp_path / "run", transformer(), loss=loss, epochs=1).fit(TRAIN, TEST)
    assert [each.metrics.test_error_percent is not None for each in records] == [True] * 4


# A run


def test_a_transformer_is_trained_stored_and_evaluated(run: Path) -> None:
    for number in (1, 2, 3):
        store = Store(run / f"stage{number}/activations.zarr/train")
        assert store.row_shape == (TOKENS, WIDTH)
        assert len(store.encoding.scale) == WIDTH  # a range each feature, as maps have
    trainer = new_trainer(run, transformer(), epochs=3)
    lines = [(run / f"stage{n}/history.jsonl").read_text().splitlines() for n in range(1, 5)]
    assert [len(each) for each in lines] == [3] * 4
    result = evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
    assert result.samples == len(TEST)
    stages = similarity_by_stage(trainer.run, trainer.loss, transformer()).stages
    assert [each.features for each in stages[1:4]] == ["similarity head"] * 3


def test_a_transformer_goes_on_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    cut_short = tmp_path / "run"
    stopped = new_trainer(cut_short, transformer(), epochs=3, reporter=Listener(interrupted=2))
    with pytest.raises(Interrupted):
        stopped.fit(TRAIN, TEST)
    new_trainer(cut_short, transformer(), epochs=3).fit(TRAIN, TEST)
    for number in (1, 2, 3, 4):
        assert same(weights(run, number), weights(cut_short, number))


@pytest.mark.parametrize("until", [2, None])
def test_a_transformer_is_exported_whole_and_from_an_early_exit(
    run: Path, tmp_path: Path, until: int | None
) -> None:
    trainer = new_trainer(run, transformer(), epochs=3)
    x = torch.rand(5, 1, SIDE, SIDE)
    expected = trainer.assemble(until)(x)
    what = (trainer.run, trainer.loss, transformer())
    program = export(*what, tmp_path / "net.pt2", "torch-export", until)
    torch.testing.assert_close(torch.export.load(program).module()(x), expected)
    session = onnxruntime.InferenceSession(str(export(*what, tmp_path / "n.onnx", "onnx", until)))
    (logits,) = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="cannot say how to rebuild Patches"):
        export(*what, tmp_path / "net.safetensors", "safetensors", until)


def test_the_command_line_plans_trains_and_reads_a_transformer(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model = ("--model", "test_tokens:transformer")
    plan = answer("plan", "--run", run, *model, "--device", "cpu")
    assert [each["name"] for each in plan["stages"][1:3]] == ["transformer8", "transformer8"]
    assert all(each["peak_memory_bytes"] > 0 for each in plan["stages"])
    assert "no mode but plain" not in said("plan", "--run", run, *model, "--device", "cpu")
    assert len(answer("evaluate", "--run", run, *model, "--by-stage")["exits"]) == 4
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(tmp_path / "new.png")
    assert "new.png" in said("predict", "--run", run, *model, tmp_path / "new.png")
    assert [each["row_shape"] for each in answer("cache", "info", run)["stores"][1:]] == [
        [TOKENS, WIDTH]
    ] * 3
    said("cache", "verify", run)


def test_a_budget_is_kept_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raise --memory-budget"):
        new_trainer(tmp_path / "run", transformer(), memory_budget="20KiB").fit(TRAIN, TEST)


# A linear layer on each token is of the pattern of single layers


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.PLAIN])
@pytest.mark.parametrize("loss", [PredSimBio(), Pred(hidden_layers=1)])
def test_micro_batches_of_tokens_give_the_batch_s_gradients(mode: Mode, loss) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(5, WIDTH), nn.GELU())
    stage = Stage(1, layer, nn.Sequential()).double()
    heads = loss.heads((TOKENS, WIDTH), CLASSES).double()
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(11, TOKENS, 5, dtype=torch.float64)
    batch = Batch(torch.arange(11) % CLASSES, lambda rows: x[rows])
    by_mode = []
    for memory in (StepMemory(), StepMemory(mode, 4)):
        learner = Learner(
            stage, heads, loss, CLASSES, "float32", memory=memory, shape=(TOKENS, WIDTH)
        )
        gradients(learner, batch)
        by_mode.append([p.grad.clone() for p in learner.parameters()])
    torch.testing.assert_close(by_mode[0], by_mode[1])


def test_batch_norm_on_tokens_is_no_single_layer() -> None:
    layer = nn.Sequential(nn.Linear(5, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    stage, heads = Stage(1, layer, nn.Sequential()), Pred().heads((WIDTH, WIDTH), CLASSES)
    for shape, usual in {(WIDTH,): True, (WIDTH, WIDTH): False}.items():
        learner = Learner(stage, heads, Pred(), CLASSES, "float32", shape=shape)
        assert (learner.parts is not None) == usual


# The store


@pytest.mark.parametrize("encoding", ["uint8", "uint4"])
def test_tokens_are_stored_with_a_range_a_feature(encoding: str) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((50, TOKENS, 3)).astype(np.float32) * [1, 100, 0.01]
    values = values.astype(np.float32)
    fitted = fit_encoding(encoding, values)
    decoded = fitted.decode_array(fitted.encode(values))
    assert decoded.shape == values.shape
    inside = np.abs(decoded - values) <= 0.51 * fitted.scale
    assert inside.mean(axis=(0, 1)).min() > 0.99
    stored = torch.from_numpy(fitted.encode(values))
    np.testing.assert_array_equal(fitted.decode(stored).numpy(), decoded)


# What is refused


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (
            nn.Sequential(Rows(), nn.Conv1d(8, 5, 3), nn.Flatten(), nn.Linear(30, CLASSES)),
            "stage 1 (conv5) gives 5x6 an image by a 1-d convolution",
        ),
        (
            nn.Sequential(Volume(), nn.Conv3d(1, 4, 1), nn.Flatten(), nn.Linear(256, CLASSES)),
            "stage 1 (conv4) gives 4x1x8x8 an image, and stages are trained on features",
        ),
        (
            nn.Sequential(ChannelsLast(), nn.Linear(1, 5), nn.Flatten(), nn.Linear(320, CLASSES)),
            "stage 1 (linear5) gives 8x8x5 an image with features last",
        ),
        (
            nn.Sequential(Rows(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, CLASSES)),
            "the network ends in tokens (8x3 an image): end it with the linear layer",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LSTM(8, 4), nn.Linear(4, CLASSES)),
            "stage 1 (linear8) gives a tuple where a tensor is needed",
        ),
        (
            nn.Sequential(Patches(), nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, CLASSES)),
            "stage 2 (linear8) cannot take an input of shape 16x8",
        ),
    ],
)
def test_other_shapes_are_one_sentence(tmp_path: Path, network: nn.Sequential, says: str) -> None:
    with pytest.raises(UserError) as refused:
        new_trainer(tmp_path / "run", network).fit(TRAIN, TEST)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_an_activation_without_heads_is_refused_though_nothing_is_stored(tmp_path: Path) -> None:
    network = nn.Sequential(Volume(), nn.Conv3d(1, 4, 1), nn.Flatten(), nn.Linear(256, CLASSES))
    with pytest.raises(UserError, match="4x1x8x8 an image, and stages are trained on features"):
        new_trainer(tmp_path / "run", network, strategy="joint").fit(TRAIN, TEST)


def test_attention_among_samples_is_refused() -> None:
    encoder = nn.TransformerEncoder(block(batch_first=False), 1, enable_nested_tensor=False)
    for wrong in (block(batch_first=False), encoder):
        with pytest.raises(UserError, match="make it with batch_first=True"):
            cut(nn.Sequential(Patches(), wrong, nn.Flatten(), nn.Linear(TOKENS * WIDTH, CLASSES)))
