"""Image sets for the examples: digits, MNIST, Fashion-MNIST and CURVES, as flat rows of pixels in [0, 1]."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
MNIST = Path("mnist")

_STEMS = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class ImageSet:
    """A set of images, split into a training and a test part."""

    name: str
    image_shape: tuple[int, int]  # (height, width)
    train: Tensor  # [train, height * width], float32 in [0, 1]
    test: Tensor  # [test, height * width], float32 in [0, 1]
    train_labels: Tensor | None = None  # [train], int64
    test_labels: Tensor | None = None  # [test], int64


def load(name: str, folder: str | Path | None = None) -> ImageSet:
    """Load a set by its name.

    Args:
        name: ``"digits"``, ``"fashion-mnist"``, ``"mnist"`` or ``"curves"``.
        folder: Where the idx files of the two MNISTs are; None for the default.

    Returns:
        The images.

    Raises:
        ValueError: If there is no such set, or a folder for a set that is not read from one.
    """
    from_folder = {"fashion-mnist": fashion_mnist, "mnist": mnist}
    loaders = {"digits": digits, "curves": curves} | from_folder
    if name not in loaders:
        raise ValueError(f"{name=} must be one of {', '.join(loaders)}")
    if folder is None:
        return loaders[name]()
    if name not in from_folder:
        raise ValueError(f"{folder=} is for {' and '.join(from_folder)}, not for {name}; leave it out")
    return from_folder[name](folder)


def digits() -> ImageSet:
    """Load scikit-learn's handwritten digits: 8 x 8 pixels, every fifth image a test image.

    Returns:
        The 1797 images, 1438 of them to train on.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.data).float() / 16
    labels = torch.from_numpy(source.target).long()
    test = torch.arange(len(images)) % 5 == 4
    return ImageSet("digits", (8, 8), images[~test], images[test], labels[~test], labels[test])


def fashion_mnist(folder: str | Path = FASHION_MNIST) -> ImageSet:
    """Load Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28 x 28 pixels.

    Args:
        folder: Where the four idx files are, compressed by gzip or not.

    Returns:
        The images with their labels.
    """
    return _idx_set("fashion-mnist", Path(folder), "install them with `apt-get install dataset-fashion-mnist`")


def mnist(folder: str | Path = MNIST) -> ImageSet:
    """Load MNIST: 60,000 + 10,000 handwritten digits, 28 x 28 pixels.

    Args:
        folder: Where the four idx files are, compressed by gzip or not.

    Returns:
        The images with their labels.
    """
    return _idx_set("mnist", Path(folder), "download them, for instance with torchvision.datasets.MNIST (folder raw)")


def curves(n: int = 30_000, seed: int = 0) -> ImageSet:
    r"""Draw the CURVES set: a smooth curve through three random points, 28 x 28 pixels.

    The curve is the quadratic $c(t)$, $t \in [0, 1]$, with $c(0), c(1/2), c(1)$ at the three points. A Gaussian pen of
    width $\sigma$ draws it: a pixel at $x$ has the value $1 - \exp(-k \int \exp(-|x - c|^2 / 2 \sigma^2) |dc|)$, which
    is 0.95 on a straight line. Six numbers describe an image, so a code of six can hold it.

    Args:
        n: Number of images; a third of them are test images.
        seed: Seed of the points; the same seed draws the same images.

    Returns:
        The images, without labels.

    References:
        Hinton and Salakhutdinov, Reducing the dimensionality of data with neural networks, Science 2006.
    """
    generator = torch.Generator().manual_seed(seed)
    middle, reach = 13.5, 10.5  # a quadratic leaves the box of its points by at most a quarter: never the image
    points = middle + reach * (2 * torch.rand(n, 3, 2, generator=generator) - 1)
    images = torch.cat([_draw(part) for part in points.split(2_000)])
    split = n - n // 3
    return ImageSet("curves", (28, 28), images[:split], images[split:])


def _draw(points: Tensor, size: int = 28, samples: int = 100, sigma: float = 0.7) -> Tensor:
    """Draw the quadratic curve through three points.

    Args:
        points: The points in pixels, ``[n, 3, 2]``.
        size: Height and width of the images.
        samples: Number of points at which the integral along the curve is taken.
        sigma: Width of the pen in pixels.

    Returns:
        The images, ``[n, size * size]``.
    """
    t = torch.linspace(0, 1, samples)
    through = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)])  # Lagrange, [3, samples]
    speed = torch.stack([4 * t - 3, 4 - 8 * t, 4 * t - 1])  # its derivative in t
    curve = torch.einsum("npd,pt->dnt", points, through)
    length = torch.einsum("npd,pt->dnt", points, speed).norm(dim=0) / samples  # |dc| of each sample, [n, samples]
    # the pen is separable: exp(-|x - c|^2) is a product of a profile over rows and one over columns, [n, size, samples]
    squared = ((torch.arange(size)[:, None] - curve[..., None, :]) / sigma) ** 2
    rows, columns = torch.exp(-0.5 * squared.clamp(max=80.0))  # e^-40 is no ink; less would be slow subnormal numbers
    ink = torch.einsum("nit,njt->nij", rows * length[:, None, :], columns)
    full = 3 / (sigma * math.sqrt(2 * math.pi))  # three times the ink on the middle of a straight line
    return rearrange(-torch.expm1(-full * ink), "n i j -> n (i j)")


def _idx_set(name: str, folder: Path, remedy: str) -> ImageSet:
    """Read the four idx files of an MNIST-like set.

    Args:
        name: Name of the set.
        folder: Where the files are.
        remedy: How to get them, for the error message.

    Returns:
        The images with their labels.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If there are not as many labels as images.
    """
    found = {stem: _find(folder, stem) for stem in _STEMS}
    missing = [f"{stem}[.gz]" for stem, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{name}: {', '.join(missing)} not found in {folder.absolute()}; {remedy}, "
            "or name the folder that holds them with `--data-dir`"
        )
    axes = {stem: 3 if "idx3" in stem else 1 for stem in _STEMS}
    train, test, train_labels, test_labels = (read_idx(path, axes[stem]) for stem, path in found.items())
    for images, labels in ((train, train_labels), (test, test_labels)):
        if len(images) != len(labels):
            raise ValueError(
                f"{name}: {len(images)} images and {len(labels)} labels in {folder.absolute()} must be equally many; "
                "take all four files from one source"
            )
    height, width = train.shape[1:]
    train, test = (rearrange(images, "n h w -> n (h w)").float() / 255 for images in (train, test))
    return ImageSet(name, (height, width), train, test, train_labels.long(), test_labels.long())


def _find(folder: Path, stem: str) -> Path | None:
    """Return the plain or else the compressed file of that stem, or None if there is neither."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: str | Path, axes: int) -> Tensor:
    """Read an idx file of bytes: the format of MNIST.

    Args:
        path: The file; a name that ends in ``.gz`` is decompressed.
        axes: The number of axes that it must have: 3 for images, 1 for labels.

    Returns:
        Its values, uint8, in the shape that its header states.

    Raises:
        ValueError: If the file is not what the format requires.
    """
    path = Path(path)
    remedy = "the file is damaged or of another format: fetch it again"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: must be compressed by gzip, but {error}; {remedy}") from error
    header = 4 + 4 * axes
    magic, wanted = content[:4].hex(), f"{0x0800 + axes:08x}"  # 08: unsigned bytes
    if magic != wanted or len(content) < header:
        raise ValueError(f"{path}: magic={magic} must be {wanted} and head at least {header} bytes; {remedy}")
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path}: {len(content) - header} values must be {math.prod(shape)} for {shape=}; {remedy}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)
