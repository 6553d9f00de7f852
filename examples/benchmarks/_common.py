"""What the benchmarks run: models with a likelihood, a loss and random batches, and the methods that train them."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishleg_func as ff
from fishleg_func.schedule import CADENCE, spacing

Batch = tuple[Tensor, Tensor]  # (inputs, targets)

AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
IMAGE = 28  # height and width of the images of the CNN
CLASSES = 10
SHAMPOO = {
    "betas": (0.9, 0.95), "moving_average_for_momentum": True, "start_preconditioning_step": 10,
    "preconditioning_compute_steps": 10, "shape_interpretation": False,
}  # fmt: skip
AUXILIARY = 16  # batches that the original FishLeg learns Q from
VOCABULARY, WIDTH, HEADS, DEPTH, LENGTH = 256, 256, 4, 4, 128  # of the transformer
SMALL = 8  # width of the MLP


@dataclass(frozen=True)
class Problem:
    """A model and how it is trained."""

    make: Callable[[], nn.Module]
    likelihood: ff.likelihoods.Likelihood
    loss: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets): the likelihood's loss, as users of torch write it
    draw: Callable[[], Batch]  # a random batch

    def model(self, device: str) -> nn.Module:
        """Return the model, the same at every call."""
        torch.manual_seed(0)
        return self.make().to(device)

    def batch(self, device: str) -> Batch:
        """Return a fresh batch."""
        inputs, targets = self.draw()
        return inputs.to(device), targets.to(device)


def autoencoder(widths: Sequence[int] = AUTOENCODER) -> nn.Sequential:
    """Return linear layers with a ReLU after each but those of the code and of the output."""
    linear = (len(widths) // 2 - 1, len(widths) - 2)
    layers: list[nn.Module] = []
    for index, (n, m) in enumerate(pairwise(widths)):
        layers += [nn.Linear(n, m)] if index in linear else [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers)


def cnn() -> nn.Sequential:
    """Return two convolutions with BatchNorm and pooling, and two linear layers."""

    def stage(n: int, m: int) -> list[nn.Module]:
        return [nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Flatten(), nn.Linear(32 * (IMAGE // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
    return nn.Sequential(*stage(1, 16), *stage(16, 32), *head)


def mlp() -> nn.Sequential:
    """Return a network so small that only the number of calls counts."""
    return nn.Sequential(nn.Linear(SMALL, SMALL), nn.ReLU(), nn.Linear(SMALL, SMALL))


class Transformer(nn.Module):
    """A causal transformer: tokens ``[batch, time]`` to the logits of the next ones, ``[batch, time, vocabulary]``."""

    def __init__(
        self, vocabulary: int = VOCABULARY, width: int = WIDTH, depth: int = DEPTH, length: int = LENGTH
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


class Block(nn.Module):
    """Attention and a perceptron, each normalized before and added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what goes on to the next block, ``[batch, time, width]``."""
        heads = (
            self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )  # "b t (k h d) -> k b h t d"
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def bernoulli(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of logits ``[batch, pixels]``: summed over pixels, mean over images."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)


def categorical(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of logits ``[..., classes]``."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _autoencoder(size: int) -> Problem:
    def draw() -> Batch:
        images = torch.rand(size, AUTOENCODER[0])
        return images, images

    return Problem(autoencoder, ff.likelihoods.Bernoulli(), bernoulli, draw)


def _classifier(make: Callable[[], nn.Module], draw: Callable[[], Batch]) -> Problem:
    return Problem(make, ff.likelihoods.Categorical(), categorical, draw)


PROBLEMS = {
    "ae32": _autoencoder(32),
    "ae100": _autoencoder(100),
    "ae500": _autoencoder(500),
    "cnn": _classifier(cnn, lambda: (torch.rand(128, 1, IMAGE, IMAGE), torch.randint(CLASSES, (128,)))),
    "transformer": _classifier(Transformer, lambda: tuple(torch.randint(VOCABULARY, (2, 16, LENGTH)))),
    "mlp": _classifier(mlp, lambda: (torch.randn(32, SMALL), torch.randint(SMALL, (32,)))),
}


# The methods


@dataclass(frozen=True)
class Contender:
    """A method at work on a model of its own."""

    step: Callable[[Tensor, Tensor], object]
    state_bytes: Callable[[], int]  # kept between steps
    set_rate: Callable[[float], object]  # of learning
    period: int  # steps in which it does all that it ever does
    jump: Callable[[int], None] | None = None  # FishLeg: make the next step number t
    every: Callable[[], int] | None = None  # FishLeg: steps between statistics, with batches like the last


def contender(method: str, problem: Problem, model: nn.Module, original: Path | None = None) -> Contender:
    """Return a method at its defaults, ready to train a model.

    Args:
        method: One of ``METHODS``.
        problem: The likelihood, the loss and the batches.
        model: From ``problem.model``.
        original: Checkout of the original FishLeg, for the method ``"original"``.

    Returns:
        The contender, which has made no step yet.
    """
    return make_original(problem, model, original) if method == "original" else MAKERS[method](problem, model)


def make_fishleg(problem: Problem, model: nn.Module, compiled: bool = False, **settings: Any) -> Contender:
    """Return FishLeg, at its defaults but for the settings."""
    fishleg = ff.fishlegify(model, problem.likelihood, **settings)
    step = torch.compile(fishleg, fullgraph=True) if compiled else fishleg
    return _of(fishleg, step, fishleg.hyper.lr.fill_)


def make_optimizer(problem: Problem, model: nn.Module) -> Contender:
    """Return FishLeg as an optimizer, which meets the gradients that ``backward`` leaves in the parameters."""
    optimizer = ff.FishLeg(model, problem.likelihood)
    usual = conventional(problem, model, [optimizer])
    return _of(optimizer.fishleg, usual.step, usual.set_rate)


def _of(
    fishleg: ff.FishLegStep, step: Callable[[Tensor, Tensor], object], set_rate: Callable[[float], object]
) -> Contender:
    def jump(t: int) -> None:
        fishleg.load_state_dict(fishleg.state_dict() | {"t": t})

    def state_bytes() -> int:
        return sum(row.state_bytes for row in fishleg.report().rows)

    def every() -> int:
        return spacing(fishleg.live_state()["rows"])

    return Contender(step, state_bytes, set_rate, CADENCE, jump, every)


def make_adamw(problem: Problem, model: nn.Module) -> Contender:
    """Return AdamW."""
    return conventional(problem, model, [torch.optim.AdamW(model.parameters())])


def make_muon(problem: Problem, model: nn.Module) -> Contender:
    """Return Muon for the weights of linear layers, and AdamW for the rest: it takes matrices only.

    Its updates are scaled to the size of AdamW's, so that one rate suits both.
    """
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and p not in tables]
    rest = [p for p in model.parameters() if p.ndim != 2 or p in tables]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    return conventional(problem, model, [muon, torch.optim.AdamW(rest)])


def make_soap(problem: Problem, model: nn.Module) -> Contender:
    """Return SOAP, which renews its bases every so many steps."""
    optimizer = importlib.import_module("pytorch_optimizer").SOAP(model.parameters())
    return conventional(problem, model, [optimizer], optimizer.defaults["precondition_frequency"])


def make_shampoo(problem: Problem, model: nn.Module) -> Contender:
    """Return Shampoo with blocks, momentum as an average, roots every ten steps, and lengths of RMSProp, as is usual.

    By default the package takes roots every thousand steps, and lengths of SGD; its first Shampoo takes them at each.
    Shapes are taken as they are: small matrices would be made vectors, which have no roots.
    """
    shampoo = importlib.import_module("pytorch_optimizer.optimizer.shampoo")
    optimizer = shampoo.ScalableShampoo(model.parameters(), **SHAMPOO, graft_type=shampoo.LayerWiseGrafting.RMSPROP)
    return conventional(problem, model, [optimizer], optimizer.preconditioning_compute_steps)


def make_original(problem: Problem, model: nn.Module, folder: Path) -> Contender:
    """Return the original FishLeg, with the initial scale that its examples give it."""
    original = import_original(folder)
    device = next(model.parameters()).device.type
    damping = inspect.signature(original.FishLeg).parameters["damping"].default
    model = original.initialise_FishModel(model, "__ALL__", fish_scale=1 / damping).to(device)
    names = {ff.likelihoods.Bernoulli: "bernoulli", ff.likelihoods.Categorical: "softmax"}
    likelihood = original.FISH_LIKELIHOODS[names[type(problem.likelihood)]](device=device)
    auxiliary = [problem.batch(device) for _ in range(AUXILIARY)]  # made before, so that they cost no time
    optimizer = original.FishLeg(model, auxiliary, likelihood, device=device)
    learned = [p for p in model.parameters() if isinstance(p, original.FishAuxParameter)]
    every = optimizer.defaults["update_aux_every"]
    usual = conventional(problem, model, [optimizer], every, [learned, optimizer.aux_opt.state])

    def step(inputs: Tensor, targets: Tensor) -> None:
        try:
            usual.step(inputs, targets)
        except ValueError as error:  # what it samples targets from takes no NaN
            if all(p.isfinite().all() for p in model.parameters()):
                raise
            raise FloatingPointError("the original FishLeg has made a parameter that is not finite") from error

    return replace(usual, step=step)


def import_original(folder: Path) -> ModuleType:
    """Return the original's package, with stand-ins for what it imports but does not use here."""
    stand_ins = {
        "transformers.models.bert.modeling_bert": {"BertAttention": type("BertAttention", (nn.Module,), {})},
        "torch.utils.tensorboard": {"SummaryWriter": object},
    }
    for name, contents in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules.setdefault(name, module)
    source = str(folder.absolute() / "src")
    if source not in sys.path:
        sys.path.append(source)
    return importlib.import_module("optim.FishLeg")


def conventional(
    problem: Problem, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], period: int = 1, more: Any = ()
) -> Contender:
    """Return the usual training step: zero_grad, forward, backward, update.

    Args:
        problem: Gives the loss.
        model: The model.
        optimizers: For parts of the model each, together for all of it.
        period: Steps in which they do all that they ever do.
        more: What is kept between steps beside the optimizers' own state.

    Returns:
        A contender.
    """

    def step(inputs: Tensor, targets: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        problem.loss(model(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()

    def set_rate(rate: float) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    return Contender(step, lambda: tensor_bytes([[o.state for o in optimizers], more]), set_rate, period)


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping | list | tuple):
        return sum(map(tensor_bytes, state.values() if isinstance(state, Mapping) else state))
    return tensor_bytes(vars(state)) if type(state).__module__.startswith("pytorch_optimizer") else 0


MAKERS: dict[str, Callable[[Problem, nn.Module], Contender]] = {
    "adamw": make_adamw,
    "fishleg": make_fishleg,
    "compiled": partial(make_fishleg, compiled=True),
    "optimizer": make_optimizer,
    "muon": make_muon,
    "soap": make_soap,
    "shampoo": make_shampoo,
}
METHODS = (*MAKERS, "original")
