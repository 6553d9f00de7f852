"""The oracle against closed forms made by hand: everything else in the library is checked against the oracle."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fishleg_func import reference
from fishleg_func.reference import Block

LIKELIHOODS = ("gaussian", "bernoulli", "categorical", "poisson")
SIGMA = 0.7


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(model: nn.Module) -> nn.Module:  # in float64, with values that do not depend on torch's defaults
    for k, parameter in enumerate(model.double().parameters()):
        parameter.data.copy_(0.5 * randn(*parameter.shape, seed=k))
    return model


def mlp() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 3, bias=False)))


def labels(likelihood: str, outputs: Tensor, seed: int = 0) -> Tensor:  # drawn from the model's own distribution
    source = torch.Generator().manual_seed(seed)
    if likelihood == "categorical":
        return torch.multinomial(outputs.softmax(-1).flatten(0, -2), 1, generator=source).reshape(outputs.shape[:-1])
    if likelihood == "bernoulli":
        return torch.bernoulli(outputs.sigmoid(), generator=source)
    if likelihood == "poisson":
        return torch.poisson(outputs.exp(), generator=source)
    return outputs + SIGMA * torch.randn(outputs.shape, dtype=outputs.dtype, generator=source)


def draw(family: str, m: int, n: int, *lead: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # lambda, basis
    row = (m,) if family == "embedding" else (m, n)
    side = m * n if family == "dense" else n
    shapes = {"L": (side, side), "R": (m, m), "s": row, "C_L": (n, n), "C_R": (m, m), "c": row}
    x = {key: randn(*lead, *shape, seed=k) for k, (key, shape) in enumerate(shapes.items())}
    for key in ("L", "R", "C_L", "C_R"):
        near = torch.eye(x[key].shape[-1]) + 0.2 * x[key]
        x[key] = torch.linalg.qr(near)[0] if family == "eigen" else near
    x["c"] = x["c"].abs() + 0.5
    lam, basis = reference.FAMILIES[family]
    return {key: x[key] for key in sorted(lam)}, {key: x[key] for key in sorted(basis)}


def identity_blocks(model: nn.Module) -> dict[str, Block]:  # Q = I everywhere
    shapes = [(k, shape) for k, (_, shape) in reference.block_indices(model).items()]
    eyes = {k: {"L": torch.eye(n).repeat(*g, 1, 1), "R": torch.eye(m).repeat(*g, 1, 1)} for k, (*g, m, n) in shapes}
    return {k: Block("kronecker", lam) for k, lam in eyes.items()}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_losses_agree_with_torch(likelihood: str) -> None:
    f = randn(5, 2, 3)
    y = labels(likelihood, f)
    if likelihood == "categorical":
        y[2, 1] = -100
    expected = {
        "gaussian": lambda: -torch.distributions.Normal(f, SIGMA).log_prob(y).sum() / 5,
        "bernoulli": lambda: functional.binary_cross_entropy_with_logits(f, y, reduction="sum") / 5,
        "categorical": lambda: functional.cross_entropy(f.flatten(0, 1), y.flatten()),
        "poisson": lambda: -torch.distributions.Poisson(f.exp()).log_prob(y).sum() / 5,
    }[likelihood]()
    torch.testing.assert_close(reference.negative_log_likelihood(f, y, likelihood, sigma=SIGMA), expected)


def test_likelihood_errors() -> None:
    with pytest.raises(ValueError, match=r"'softmax'.*'categorical'"):
        reference.fisher(nn.Linear(1, 1), torch.ones(1, 1), "softmax")
    with pytest.raises(ValueError, match=r"\(2, 1\) must have shape \(2, 3\)"):
        reference.negative_log_likelihood(torch.zeros(2, 3), torch.zeros(2, 1), "gaussian")


def test_jacobian_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    model(randn(4, 3).float()).square().sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    assert reference.jacobian(model, randn(4, 3, seed=1).float()).shape == (8, 12) and model.training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)


def test_jacobian_agrees_with_jacrev_also_for_tied_weights() -> None:
    layer = fill(nn.Linear(2, 2))
    model, x = nn.Sequential(layer, nn.Tanh(), layer), randn(3, 2)
    assert reference.names(model) == ["0.weight", "0.bias"]
    twin, params = copy.deepcopy(model), {name: p.detach() for name, p in model.named_parameters()}
    J = torch.func.jacrev(lambda params: torch.func.functional_call(twin, params, (x,)))(params)
    torch.testing.assert_close(reference.jacobian(model, x), torch.cat([J[name].reshape(6, -1) for name in params], 1))


def test_inputs_may_be_a_tuple_or_a_dict() -> None:
    model, x = fill(nn.Bilinear(2, 2, 1)), randn(2, 3, 2)
    positional = reference.jacobian(model, (x[0], x[1]))
    assert torch.equal(positional, reference.jacobian(model, {"input2": x[1], "input1": x[0]}))
    assert not torch.equal(positional, reference.jacobian(model, (x[1], x[0])))


def test_fisher_of_a_linear_gaussian_is_a_kronecker_product() -> None:
    model, x = fill(nn.Linear(3, 2, bias=False)), randn(5, 3)
    expected = torch.kron(torch.eye(2).double(), x.T @ x / 5) / SIGMA**2
    torch.testing.assert_close(reference.fisher(model, x, "gaussian", sigma=SIGMA), expected)


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson"])
def test_fisher_of_a_generalized_linear_model(likelihood: str) -> None:
    model, x = fill(nn.Linear(3, 1)), randn(5, 3)
    a = torch.cat([x, torch.ones(5, 1)], 1)
    f = model(x).detach()
    h = f.sigmoid() * (1 - f.sigmoid()) if likelihood == "bernoulli" else f.exp()
    torch.testing.assert_close(reference.fisher(model, x, likelihood), a.T @ (h * a) / 5)


def test_fisher_of_a_softmax_regression_over_a_sequence_with_a_mask() -> None:
    model, x = fill(nn.Linear(2, 3, bias=False)), randn(2, 4, 2)
    targets = torch.zeros(2, 4, dtype=torch.long)
    targets[0, 1] = targets[1, 3] = -1
    kept = (targets != -1).reshape(-1)
    p, a = model(x).detach().softmax(-1).reshape(-1, 3)[kept], x.reshape(-1, 2)[kept]
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("tij,ta,tb->iajb", H, a, a).reshape(6, 6) / 6
    torch.testing.assert_close(reference.fisher(model, x, "categorical", targets=targets, ignore_index=-1), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_fisher_is_the_mean_of_score_fisher_over_sampled_labels(likelihood: str) -> None:
    """Hold every entry within five standard errors of the Monte-Carlo mean."""
    model, x = fill(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))), randn(2, 2)
    exact, many = reference.fisher(model, x, likelihood, sigma=SIGMA), x.repeat(30, 1)
    targets = [labels(likelihood, model(many).detach(), seed) for seed in range(50)]
    draws = torch.stack([reference.score_fisher(model, many, y, likelihood, sigma=SIGMA) for y in targets])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert error.norm() < 0.1 * exact.norm()  # so that the line above says something


def test_damped_inverse() -> None:
    F = reference.fisher(mlp(), randn(4, 3), "categorical")
    eye = torch.eye(len(F)).double()
    torch.testing.assert_close(reference.damped_inverse(F, 0.1) @ (F + 0.1 * eye), eye)
    with pytest.raises(ValueError, match=r"damping=0.0 must be > 0; use"):
        reference.damped_inverse(F, 0.0)


@pytest.mark.parametrize("family", reference.FAMILIES)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_dense_q_is_symmetric_positive_definite_and_differentiable(family: str, lead: tuple[int, ...]) -> None:
    lam, basis = draw(family, 3, 2, *lead)
    leaves = [value.requires_grad_() for value in lam.values()]
    q = reference.dense_q(family, lam, basis, shape=(*lead, 3, 2))
    assert q.shape == (6 * math.prod(lead),) * 2
    torch.testing.assert_close(q, q.T)
    assert torch.linalg.eigvalsh(q).min() > 0
    assert all((slope != 0).any() for slope in torch.autograd.grad(q.square().sum(), leaves))


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_dense_q_starts_at_the_identity(family: str) -> None:
    start = {key: torch.zeros_like(x) if key == "s" else torch.eye(len(x)) for key, x in draw(family, 3, 2)[0].items()}
    assert torch.equal(reference.dense_q(family, start, shape=(3, 2)), torch.eye(6).double())


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_dense_q_acts_on_u_as_the_definition_says(family: str) -> None:
    """Compare Q vec(U) with the matrix expressions, which use no Kronecker product."""
    m, n = 3, 2
    lam, basis = draw(family, m, n)
    x, U, eye = lam | basis, randn(m, n, seed=9), {"L": torch.eye(n).double(), "R": torch.eye(m).double()}
    K_L = x.get("C_L", eye["L"]) @ x["L"] if "L" in x and family != "dense" else eye["L"]
    K_R = x.get("C_R", eye["R"]) @ x["R"].T if "R" in x else eye["R"]
    K_L, K_R = K_L @ K_L.T, K_R @ K_R.T
    scale = x.get("c", torch.ones(())) * x["s"].exp() if "s" in x else torch.ones(m, n)
    expected = {
        "kronecker": lambda: K_R @ U @ K_L,
        "kfac": lambda: K_R @ U @ K_L,
        "scaled_kronecker": lambda: scale * (K_R @ (scale * U) @ K_L),
        "eigen": lambda: x["C_R"] @ (scale**2 * (x["C_R"].T @ U @ x["C_L"])) @ x["C_L"].T,
        "diagonal": lambda: scale**2 * U,
        "dense": lambda: (x["L"] @ (x["L"].T @ U.reshape(-1))).reshape(m, n),
        "embedding": lambda: scale[:, None] ** 2 * (U @ K_L),
    }[family]()
    actual = (reference.dense_q(family, lam, basis, shape=(m, n)) @ U.reshape(-1)).reshape(m, n)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_dense_q_of_groups_is_block_diagonal(family: str) -> None:
    lam, basis = draw(family, 3, 2, 2)
    q = reference.dense_q(family, lam, basis, shape=(2, 3, 2))
    for g in range(2):
        part = [{key: value[g] for key, value in tensors.items()} for tensors in (lam, basis)]
        own = slice(6 * g, 6 * g + 6)
        torch.testing.assert_close(q[own, own], reference.dense_q(family, *part, shape=(3, 2)))
    assert not q[:6, 6:].any()


def test_dense_q_of_a_long_side_is_block_diagonal_and_drops_the_padding() -> None:
    L, C = randn(2, 3, 3), randn(2, 3, 3, seed=1)  # 5 columns in two blocks of 3
    q = reference.dense_q("kfac", {"L": L, "R": torch.ones(1, 1)}, {"C_L": C}, shape=(1, 5))
    full = torch.block_diag(*(C @ L @ L.mT @ C.mT))
    torch.testing.assert_close(q, full[:5, :5])


def test_dense_q_errors() -> None:
    with pytest.raises(ValueError) as error:
        reference.dense_q("kroneker", {}, shape=(1, 1))
    assert "'kroneker'" in str(error.value) and all(repr(family) in str(error.value) for family in reference.FAMILIES)
    for lam, basis, shape in (({"L": 1}, {}, (1, 1)), ({"s": 1}, {"C": 1}, (1, 1)), ({"s": 1}, {}, (1,))):
        with pytest.raises(ValueError, match=r"'diagonal' needs .*\(m, n\)"):
            reference.dense_q("diagonal", lam, basis, shape=shape)


def test_auxiliary_loss_is_least_at_the_damped_inverse() -> None:
    F, gamma = reference.fisher(mlp(), randn(4, 3), "categorical"), 0.1
    u, best = randn(len(F)), reference.damped_inverse(F, gamma)
    least = reference.auxiliary_loss(F, gamma, best, u)
    torch.testing.assert_close(least, -0.5 * u @ best @ u)
    assert reference.auxiliary_loss(F, gamma, best + 0.1 * torch.eye(len(F)), u) > least + 1e-6


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_surrogate_has_the_gradient_of_the_auxiliary_loss(family: str) -> None:
    lam, basis = draw(family, 3, 2)
    leaves = [value.requires_grad_() for value in lam.values()]
    root, u, q = randn(6, 6, seed=5), randn(6, seed=6), reference.dense_q(family, lam, basis, shape=(3, 2))
    F, fixed = root @ root.T, q.detach()
    w = (F + 0.1 * torch.eye(6)) @ fixed @ u - u
    for preconditioned, expected in ((False, reference.auxiliary_loss(F, 0.1, q, u)), (True, (fixed @ w) @ (q @ u))):
        actual = reference.surrogate(F, 0.1, q, u, preconditioned)
        slopes = [torch.autograd.grad(value, leaves, retain_graph=True) for value in (actual, expected)]
        torch.testing.assert_close(*slopes)


def test_relative_update_caps_each_matrix_and_each_element() -> None:
    eye, large = torch.eye(2), torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    lam = {"L": torch.stack([eye, 2 * eye]), "R": torch.stack([eye, 2 * eye]), "s": torch.zeros(2, 2)}
    d, slope = torch.stack([0.1 * eye, large]), torch.tensor([[0.1, -0.1], [5.0, -5.0]])
    new = reference.relative_update("scaled_kronecker", lam, {"L": d, "R": d, "s": slope}, 0.5)
    expected = torch.stack([0.95 * eye, 2 * (eye - large / 10)]).double()
    torch.testing.assert_close((new["L"], new["R"]), (expected, expected))
    torch.testing.assert_close(new["s"], torch.tensor([[-0.2, 0.2], [-0.5, 0.5]]).double())
    with pytest.raises(ValueError, match=r"'kfak'.*'kfac'"):
        reference.relative_update("kfak", lam, {}, 0.5)


def test_relative_update_orders_the_products_of_full_matrices() -> None:
    L, R, d = 0.1 * randn(3, 3), 0.1 * randn(3, 3, seed=1), 0.1 * randn(3, 3, seed=2)
    new = reference.relative_update("kronecker", {"L": L, "R": R}, {"L": d, "R": d}, 0.5)
    torch.testing.assert_close(new["L"], L @ (torch.eye(3) - 0.5 * L.T @ d))
    torch.testing.assert_close(new["R"], (torch.eye(3) - 0.5 * d @ R.T) @ R)


def test_adam_update_agrees_with_torch() -> None:
    x = nn.Parameter(randn(3, 2))
    lam, moments = {"s": x.detach().clone()}, {}
    adam = torch.optim.Adam([x], lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    for step in range(1, 5):
        x.grad = randn(3, 2, seed=step)
        lam, moments = reference.adam_update(lam, {"s": x.grad}, moments, step, 0.1, (0.8, 0.9), 1e-3)
        adam.step()
        torch.testing.assert_close(lam["s"], x.detach())


class Zoo(nn.Module):  # groups, kernels of one to three dims, a tied weight, a frozen bias, loose parameters
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 3, 2), nn.Conv2d(4, 6, (2, 1), groups=2)
        self.conv3, self.linear = nn.Conv3d(1, 2, 2, bias=False), nn.Linear(3, 2)
        self.embedding, self.head, self.norm = nn.Embedding(4, 3), nn.Linear(3, 4), nn.LayerNorm(3)
        self.head.weight = self.embedding.weight
        self.linear.bias.requires_grad_(False)
        self.scale, self.cube = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 2, 2))


def test_block_indices_are_a_permutation_and_pack_as_documented() -> None:
    zoo = Zoo()
    layout, flat = reference.block_indices(zoo), reference.flat_parameters(zoo)
    shapes = {name: shape for name, (_, shape) in layout.items()}
    layers = {"conv1": (3, 5), "conv2": (2, 3, 5), "conv3": (2, 8), "linear": (2, 3), "embedding.weight": (4, 3)}
    alone = {"head.bias": (1, 4), "scale": (1, 1), "cube": (2, 4), "norm": (3, 1, 2)}
    assert shapes == layers | alone
    assert torch.equal(torch.cat([where for where, _ in layout.values()]).sort().values, torch.arange(len(flat)))
    where, shape = layout["conv2"]
    weight = torch.cat([zoo.conv2.weight.flatten(1), zoo.conv2.bias[:, None]], 1).double()  # type: ignore[index]
    assert torch.equal(flat[where].reshape(shape)[1, 0], weight[3]) and torch.equal(flat[where].reshape(6, 5), weight)
    assert torch.equal(flat[layout["linear"][0]].reshape(2, 3), zoo.linear.weight.double())


def test_a_layer_that_is_called_twice_is_one_block_and_a_frozen_weight_leaves_the_bias_alone() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight.requires_grad_(False)
    layout = reference.block_indices(nn.Sequential(layer, layer, other))
    assert {name: shape for name, (_, shape) in layout.items()} == {"0": (2, 3), "2.bias": (1, 2)}


BASE = {"lr": 0.1, "beta": 0.9, "weight_decay": 0.0, "damping": 0.1, "step_norm": None}


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:  # model, inputs, targets, gradient, momentum
    model, x, y = mlp(), randn(4, 3), torch.tensor([0, 2, 1, 0])
    grads = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
    g = torch.cat([grad.reshape(-1) for grad in grads])
    return model, x, y, g, randn(len(g), seed=7)


def test_a_step_with_the_identity_is_sgd() -> None:
    model, x, y, g, m = problem()
    theta, twin = reference.flat_parameters(model), copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.01)
    functional.cross_entropy(twin(x), y).backward()
    sgd.step()
    options = BASE | {"beta": 0.0, "weight_decay": 0.01, "momentum": m}
    out = reference.training_step(model, x, y, "categorical", identity_blocks(model), **options)
    torch.testing.assert_close(out.theta, reference.flat_parameters(twin))
    torch.testing.assert_close((out.loss, out.direction), (functional.cross_entropy(model(x), y).detach(), g))
    assert out.auxiliary_loss is None and torch.equal(reference.flat_parameters(model), theta)


@pytest.mark.parametrize("rule", ["before", "after"])
def test_momentum_rules(rule: str) -> None:
    model, x, y, g, m = problem()
    blocks, layout = identity_blocks(model), reference.block_indices(model)
    blocks["0"] = Block("kronecker", draw("kronecker", 3, 4)[0])
    q, where = torch.eye(len(g)).double(), layout["0"][0]
    q[where[:, None], where] = reference.dense_q("kronecker", blocks["0"].lam, shape=(3, 4))
    out = reference.training_step(model, x, y, "categorical", blocks, momentum=m, momentum_rule=rule, **BASE)
    p = q @ (0.9 * m + 0.1 * g) if rule == "before" else 0.9 * m + 0.1 * q @ g
    torch.testing.assert_close(out.direction, p)
    torch.testing.assert_close(out.momentum, 0.9 * m + 0.1 * g if rule == "before" else p)
    torch.testing.assert_close(out.theta, reference.flat_parameters(model) - 0.1 * p)


def test_step_norms() -> None:
    model, x, y, _, m = problem()
    blocks, layout, theta = identity_blocks(model), reference.block_indices(model), reference.flat_parameters(model)
    out = reference.training_step(model, x, y, "categorical", blocks, momentum=m, **BASE | {"step_norm": "layer"})
    norms = {name: ((theta - out.theta)[where] / 0.1).norm().item() for name, (where, _) in layout.items()}
    assert norms == pytest.approx({"0": math.sqrt(3), "1": math.sqrt(3), "3": math.sqrt(3)})
    options = BASE | {"step_norm": "kl"}
    out = reference.training_step(model, x, y, "categorical", blocks, momentum=m, kl_clip=1e-4, **options)
    assert ((theta - out.theta).norm() ** 2).item() == pytest.approx(1e-4)  # lr^2 m^T Q m at Q = I
    loose = reference.training_step(model, x, y, "categorical", blocks, momentum=m, kl_clip=1e9, **options)
    torch.testing.assert_close(loose.theta, theta - 0.1 * loose.direction)


@pytest.mark.parametrize("aux_rule", ["relative", "adam"])
@pytest.mark.parametrize("precondition_aux", [False, True])
def test_learning_moves_every_block_toward_the_damped_inverse(aux_rule: str, precondition_aux: bool) -> None:
    model, x, y, g, _ = problem()
    start = blocks = identity_blocks(model)
    target, moments, errors = reference.damped_inverse(reference.fisher(model, x, "categorical"), 0.1) @ g, {}, []
    options = BASE | {"learn": True, "aux_rule": aux_rule, "precondition_aux": precondition_aux, "aux_lr": 0.02}
    for step in range(1, 31):
        options |= {"momentum": g, "beta": 1.0, "moments": moments, "aux_step": step}  # so that the direction is Q g
        out = reference.training_step(model, x, y, "categorical", blocks, **options)
        blocks, moments = out.blocks, out.moments
        errors.append((out.direction - target).norm().item())
    assert errors[-1] < 0.9 * errors[0]
    for name, block in blocks.items():
        assert not torch.allclose(block.lam["L"], start[name].lam["L"].double()), name


def test_learning_by_hand_in_one_dimension() -> None:
    """Solve f = a x with F = x^2 / sigma^2 = 4, gamma = 1, Q = L^2 = 1: u = 1, v = 1, w = 4, dA/dL = 8."""
    model, x = nn.Linear(1, 1, bias=False), torch.tensor([[2.0]])
    blocks = {"(root)": Block("dense", {"L": torch.ones(1, 1)})}
    options = BASE | {"damping": 1.0, "learn": True, "momentum": torch.zeros(1), "probe": -3 * torch.ones(1)}
    out = reference.training_step(model, x, x, "gaussian", blocks, aux_lr=0.2, **options)
    torch.testing.assert_close(out.auxiliary_loss, torch.tensor(1.5).double())
    torch.testing.assert_close(out.blocks["(root)"].lam["L"], torch.tensor([[0.8]]).double())
    options |= {"curvature": torch.tensor([[0.0]])}  # w = 0: nothing to learn
    out = reference.training_step(model, x, x, "gaussian", blocks, **options)
    torch.testing.assert_close(out.blocks["(root)"].lam["L"], torch.ones(1, 1).double())


ERRORS = (
    ({"step_norm": "layers"}, r"step_norm='layers'.*None, 'layer', 'kl'"),
    ({"step_norm": "kl", "momentum_rule": "after"}, r"step_norm='kl'.*None, 'layer'$"),
    ({"momentum_rule": "behind"}, r"momentum_rule='behind'.*'before', 'after'"),
    ({"aux_rule": "sgd"}, r"aux_rule='sgd'.*'relative', 'adam'"),
    ({"blocks": {}}, r"blocks=\[\] must be \['0', '1', '3'\]"),
)


@pytest.mark.parametrize(("change", "match"), ERRORS)
def test_training_step_errors(change: dict[str, object], match: str) -> None:
    model, x, y, _, m = problem()
    arguments = BASE | {"blocks": identity_blocks(model), "momentum": m} | change
    with pytest.raises(ValueError, match=match):
        reference.training_step(model, x, y, "categorical", **arguments)
