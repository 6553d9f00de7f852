"""The examples: their data are what they say, and both methods of the autoencoder learn."""

import gzip
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
IDX = {"train-images-idx3-ubyte": (3, 4, 5), "t10k-images-idx3-ubyte": (2, 4, 5)} | {
    "train-labels-idx1-ubyte": (3,),
    "t10k-labels-idx1-ubyte": (2,),
}


@pytest.fixture(scope="module", autouse=True)
def _examples_on_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def data() -> ModuleType:
    return importlib.import_module("data")


@pytest.fixture
def autoencoder() -> ModuleType:
    return importlib.import_module("autoencoder")


def idx_bytes(values: torch.Tensor) -> bytes:
    """Return the idx file of some bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().byte().tolist())


@pytest.fixture
def idx_folder(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a tiny set, half of it compressed, and its values."""
    generator = torch.Generator().manual_seed(0)
    values = {stem: torch.randint(256, shape, generator=generator, dtype=torch.uint8) for stem, shape in IDX.items()}
    for stem, tensor in values.items():
        if stem.startswith("train"):
            (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(idx_bytes(tensor)))
        else:
            (tmp_path / stem).write_bytes(idx_bytes(tensor))
    return tmp_path, values


def test_digits(data: ModuleType) -> None:
    images = data.load("digits")
    assert images.train.shape == (1438, 64) and images.test.shape == (359, 64)
    assert images.train.dtype == torch.float32
    assert images.train.min() == 0 and images.train.max() == 1
    assert images.test_labels.bincount().min() > 20


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_sets_read_plain_and_compressed_files(
    data: ModuleType, idx_folder: tuple[Path, dict[str, torch.Tensor]], name: str
) -> None:
    folder, values = idx_folder
    images = data.load(name, folder)
    assert images.name == name and images.image_shape == (4, 5)
    torch.testing.assert_close(images.train, values["train-images-idx3-ubyte"].reshape(3, 20) / 255)
    torch.testing.assert_close(images.test, values["t10k-images-idx3-ubyte"].reshape(2, 20) / 255)
    assert images.train_labels.tolist() == values["train-labels-idx1-ubyte"].tolist()
    assert images.test_labels.tolist() == values["t10k-labels-idx1-ubyte"].tolist()


def test_missing_files_are_all_named_with_the_folder_and_the_remedy(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(FileNotFoundError) as caught:
        data.fashion_mnist(tmp_path)
    message = str(caught.value)
    for part in (*(set(IDX) - {"train-images-idx3-ubyte"}), str(tmp_path), "apt-get install", "--data-dir"):
        assert part in message
    assert "train-images" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("magic", bytes([0, 0, 8, 1]) + bytes(16), "magic=00000801 must be 00000803"),
        ("empty", b"", "must be 00000803"),
        ("header", bytes([0, 0, 8, 3, 0, 0]), "at least 16 bytes"),
        ("short", idx_bytes(torch.zeros(2, 3, 4))[:-1], "23 values must be 24"),
        ("long", idx_bytes(torch.zeros(2, 3, 4)) + b"0", "25 values must be 24"),
        ("plain.gz", idx_bytes(torch.zeros(2, 3, 4)), "must be compressed by gzip"),
        ("cut.gz", gzip.compress(idx_bytes(torch.zeros(2, 3, 4)))[:-9], "must be compressed by gzip"),
        ("changed.gz", gzip.compress(idx_bytes(torch.zeros(2, 3, 4)))[:10] + bytes([7] * 20), "must be compressed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_corrupt_files_raise(data: ModuleType, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_idx(tmp_path / name, 3)
    assert str(tmp_path / name) in str(caught.value) and "fetch it again" in str(caught.value)


def test_as_many_labels_as_images(data: ModuleType, idx_folder: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = idx_folder
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(7)))
    with pytest.raises(ValueError, match="2 images and 7 labels"):
        data.mnist(folder)


def test_load_refuses_unknown_names_and_useless_folders(data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        data.load("letters")
    with pytest.raises(ValueError, match="leave it out"):
        data.load("curves", tmp_path)


def test_curves(data: ModuleType) -> None:
    images, same, other = data.curves(300, seed=1), data.curves(300, seed=1), data.curves(300, seed=2)
    assert images.train.shape == (200, 784) and images.test.shape == (100, 784)
    assert images.train.dtype == torch.float32
    assert torch.equal(images.train, same.train) and torch.equal(images.test, same.test)
    assert not torch.equal(images.train, other.train) and not torch.equal(images.train[:100], images.test)
    every = torch.cat([images.train, images.test])
    assert every.min() >= 0 and every.max() <= 1
    assert every.amax(dim=1).min() > 0.5 and every.amax(dim=1).median() > 0.9  # each has a stroke
    assert 0.03 < every.mean() < 0.15  # ... of a thin pen
    border = every.reshape(-1, 28, 28).clone()
    border[:, 1:-1, 1:-1] = 0
    assert border.sum() < 0.01 * every.sum()  # that stays on the page


def test_curves_pass_through_their_points(data: ModuleType) -> None:
    points = torch.tensor([[[4.0, 5.0], [13.0, 20.0], [22.0, 7.0]]])  # (row, column)
    image = data._draw(points).reshape(28, 28)
    rows, columns = points[0, 1].long()
    assert image[rows, columns] > 0.9  # the middle point
    assert image[4, 5] > 0.6 and image[22, 7] > 0.6  # the ends, where half of the pen's ink is missing
    assert image[0, 27] < 1e-3


def test_adamw_learns_and_draws(autoencoder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "picture.png"
    arguments = ["--optimizer", "adamw", "--epochs", "1", "--adamw-lr", "1e-3", "1e-9", "--plot", str(plot)]
    results = autoencoder.main(arguments)
    assert results.fishleg is None and results.equal_seconds is None
    assert [run.method.rate for run in results.adamw] == [1e-3, 1e-9]
    best = results.best_adamw
    assert best.method.rate == 1e-3
    assert best.last.test_loss < 0.9 * best.points[0].test_loss
    assert best.last.train_loss < 0.9 * best.points[0].train_loss
    assert best.last.seconds > 0 and best.points[0].seconds == 0
    assert plot.stat().st_size > 10_000
    assert "AdamW 0.001" in capsys.readouterr().out


def test_fishleg_learns_beside_adamw(autoencoder: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    results = autoencoder.main(["--epochs", "2", "--adamw-lr", "3e-3", "--plot", "none"])
    fishleg = results.fishleg
    assert len(fishleg.points) == 3
    assert all(math.isfinite(loss) for point in fishleg.points for loss in (point.train_loss, point.test_loss))
    assert fishleg.last.test_loss < 0.8 * fishleg.points[0].test_loss
    assert fishleg.points[0].test_loss == results.best_adamw.points[0].test_loss  # the same start
    longer = results.equal_seconds
    assert longer.method.rate == 3e-3
    assert fishleg.last.seconds <= longer.last.seconds < 1.5 * fishleg.last.seconds
    printed = capsys.readouterr().out
    assert "at equal epochs" in printed and "at equal seconds" in printed


def test_fishleg_is_below_adamw_at_equal_epochs(autoencoder: ModuleType) -> None:
    results = autoencoder.compare(
        autoencoder.parse(["--epochs", "10"]), importlib.import_module("data").digits(), autoencoder.Console(quiet=True)
    )
    assert results.fishleg.last.test_loss < 0.9 * results.best_adamw.last.test_loss


def test_methods_train_alike(autoencoder: ModuleType) -> None:
    arguments = ["--optimizer", "adamw", "--epochs", "1", "--adamw-lr", "1e-3", "1e-3", "--plot", ""]
    first, second = autoencoder.main(arguments).adamw
    assert first.points[1].test_loss == second.points[1].test_loss
    other = autoencoder.main([*arguments, "--seed", "1"]).adamw[0]
    assert other.points[1].test_loss != first.points[1].test_loss


@pytest.mark.parametrize(
    ("fishleg", "rival", "said"),
    [
        (10.0, 20.0, "50.0% below"),
        (20.0, 10.0, "100.0% above"),
        (10.0, 10.0, "0.0% away from"),
        (math.nan, 10.0, "nan% away from"),
    ],
)
def test_verdict_says_what_the_numbers_say(autoencoder: ModuleType, fishleg: float, rival: float, said: str) -> None:
    def run(name: str, loss: float) -> object:
        method = autoencoder.Method(name, autoencoder.make_adamw, 1e-3, 1)
        points = (autoencoder.Point(0, 30.0, 30.0, 0.0), autoencoder.Point(1, loss, loss, 1.5))
        return autoencoder.Run(method, points, torch.zeros(1, 64))

    images = importlib.import_module("data").digits()
    runs = run("FishLeg", fishleg), (run("AdamW", rival),), (run("AdamW, equal seconds", rival),)
    assert autoencoder.verdict(autoencoder.Results(images, *runs)).count(said) == 2


def test_wrong_arguments_are_all_named(autoencoder: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        autoencoder.parse(["--epochs", "0", "--lr", "-1"])
    assert "--epochs 0, --lr -1.0 must be > 0" in capsys.readouterr().err
    config = autoencoder.parse(["--batch-size", "2000", "--plot", "none"])
    with pytest.raises(ValueError, match="--batch-size 2000 must be <= 1438"):
        autoencoder.main(["--batch-size", str(config.batch_size), "--plot", "none"])
