"""What makes a step fast changes nothing but its cost: factored updates, carried directions, products by halves."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_close, randn
from test_qmodules import build, check_relative, check_retract
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fishleg_func as ff
from fishleg_func import _linalg, _sides, blocks
from fishleg_func._trees import dense
from fishleg_func._types import LowRank


def product_flops(_: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **__: object) -> int:
    """Operations of ``addmm_``, which torch does not count by itself."""
    return 2 * a[0] * a[1] * b[1]


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linalg, "LEAF", 3)


@pytest.mark.usefixtures("small_leaves")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 29])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_products_and_inverses_by_halves(n: int, lead: tuple[int, ...]) -> None:
    a = randn(*lead, n, n, seed=n)
    lower = a.tril() / n + torch.eye(n)
    torch.testing.assert_close(_linalg.inverse_lower(lower), lower.inverse(), rtol=1e-10, atol=1e-10)
    wide = randn(*lead, n, 5, seed=n + 1)
    torch.testing.assert_close(_linalg.outer_square(wide), wide @ wide.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["inverse_lower", "outer_square"])
def test_products_by_halves_save_work(side: str) -> None:
    """Count FLOPs: at most 0.7 of the plain product's, for a side of 1000."""
    a = torch.eye(1000)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as counted:
        getattr(_linalg, side)(a)
    assert 0 < counted.get_total_flops() <= 0.7 * 2 * 1000**3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [3, 8])
def test_rows_times_a_matrix(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the product, and that it is made from the left where rows are few and threads several."""
    monkeypatch.setattr(_sides, "_threads", lambda: threads)
    x, matrix = randn(rows, 8), randn(8, 8, seed=1)
    product = _sides.Side.of(8, 8).mul(x, matrix)
    torch.testing.assert_close(product, torch.einsum("ri,ij->rj", x, matrix))
    assert product.is_contiguous() is not (rows < 8 and threads > 1)


@pytest.mark.parametrize("name", ["kronecker", "kfac", "scaled_kronecker", "embedding"])
@pytest.mark.parametrize("rows", [1, 2, None])
@pytest.mark.parametrize("max_dim", [4096, 10])
@pytest.mark.parametrize("shape", [(9, 16), (2, 16, 9), (5, 27)])
def test_steps_along_factored_gradients(name: str, rows: int | None, max_dim: int, shape: tuple[int, ...]) -> None:
    """Hold them where few rows meet sides long enough that no square matrix but λ and its operator is formed."""
    case = build(name, shape, torch.float64, 3, 0.5, max_dim)
    check_relative(case, (rows is not None,) * 2)
    check_retract(case, rows)


@pytest.mark.parametrize("name", ["kronecker", "kfac"])
@pytest.mark.parametrize("max_dim", [4096, 10])
@pytest.mark.parametrize("shape", [(9, 16), (2, 16, 9), (5, 27), (27, 5)])
@pytest.mark.parametrize("ok", [None, True, False])
def test_a_carried_direction_is_q_times_the_momentum(
    name: str, max_dim: int, shape: tuple[int, ...], ok: bool | None
) -> None:
    case = build(name, shape, torch.float64, 3, 0.5, max_dim)
    allowed = None if ok is None else torch.tensor(ok)
    operator, m = case.q.operator(), case.probe()
    before = dense(case.q.act(operator, m))
    u, w = (case.probe(factored=True, rows=1) for _ in range(2))
    gradients = case.q.relative(operator, u, case.q.act(operator, u), w)
    carry = case.q.retract_(operator, gradients, torch.tensor(0.3).double(), allowed)
    after = dense(case.q(m))
    assert ((after - before).norm() > 1e-3 * before.norm()) == (ok is not False)
    if min(shape[-2:]) > 5:  # shorter sides take the dense way
        assert carry is not None
    if carry is not None:
        assert_close(carry(before), after, 1e-10)


def test_no_square_matrix_is_multiplied_where_few_rows_meet_long_sides() -> None:
    """Count the FLOPs of a move of λ, K and Q m: less than a single product of two square matrices."""
    q = ff.families.KFAC((512, 512))
    operator = q.operator()
    u, w = (LowRank(torch.randn(8, 512), torch.randn(8, 512)) for _ in range(2))
    v = q.act(operator, u)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as counted:
        carry = q.retract_(operator, q.relative(operator, u, v, w), torch.tensor(0.2))
        assert carry is not None
        carry(torch.randn(512, 512))
    assert counted.get_total_flops() < 2 * 512**3


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(140, 130), nn.Tanh(), nn.Linear(130, 3))


@pytest.mark.parametrize("rows", [1, blocks._PROBE_ROWS, 2 * blocks._PROBE_ROWS - 1])
def test_few_rows_are_all_probed(rows: int) -> None:
    step = ff.fishlegify(wide(), ff.likelihoods.Gaussian(), u="gradient")
    batch = step._runner.run(torch.randn(rows, 140), torch.randn(rows, 3), twice=True)
    _, g = batch.gradient()
    assert all(x is g[k] for k, x in batch.probe(step.q).items())


def test_many_rows_are_probed_by_some_and_the_estimate_is_that_of_the_gradient() -> None:
    """Hold that the probe of the long layer is the gradient of some examples, and exact for equal examples."""
    model, count = wide().double(), 4 * blocks._PROBE_ROWS
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(), u="gradient")
    x, y = randn(count, 140), randn(count, 3, seed=1)
    batch = step._runner.run(x, y, twice=True)
    u, g = batch.probe(step.q), batch.gradient()[1]
    twin, chosen = copy.deepcopy(model), blocks.spread(count, blocks._PROBE_ROWS, x.device)
    ff.likelihoods.Gaussian().nll(twin(x[chosen]), y[chosen]).backward()
    assert isinstance(u["0"], LowRank) and u["0"].d.shape[0] == blocks._PROBE_ROWS
    assert_close(u["0"].dense()[:, :-1], twin[0].weight.grad, 1e-10)  # type: ignore[arg-type]
    assert u["2"] is g["2"]
    equal = step._runner.run(x[:1].expand(count, -1), y[:1].expand(count, -1), twice=True)
    assert_close(dense(equal.probe(step.q)["0"]), dense(equal.gradient()[1]["0"]), 1e-10)


@pytest.mark.parametrize("count", [32, 33, 512, 2048, 25088])
@pytest.mark.parametrize("period", [2, 8, 32, 49, 128])
def test_probed_rows_follow_no_period(count: int, period: int) -> None:
    """Rows are ordered by example, then by position: hold that a probe is of many positions, and of all examples."""
    rows = blocks.spread(count, blocks._PROBE_ROWS, torch.device("cpu"))
    assert len(rows.unique()) == blocks._PROBE_ROWS and rows[0] >= 0 and rows[-1] < count
    if count >= 16 * period:
        assert len((rows % period).unique()) >= min(period, 16) // 2


def test_masked_positions_do_not_blind_the_probe() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 128), nn.Linear(128, 140))
    step = ff.fishlegify(model, ff.likelihoods.Categorical(), u="gradient")
    x, y = torch.randint(50, (16, 32)), torch.randint(140, (16, 32))
    y[:, :4] = -100
    batch = step._runner.run(x, y, twice=True)
    batch.gradient()
    assert all(dense(u).norm() > 0 for u in batch.probe(step.q).values())


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_statistics_of_many_rows_are_estimated_without_bias(layer: str) -> None:
    """Hold cov_L and cov_R of many noisy positions near those of all rows, which the oracle's formula takes."""
    torch.manual_seed(0)
    model: nn.Module = nn.Conv2d(3, 4, 3, padding=1) if layer == "conv" else nn.Linear(6, 4)
    x = torch.randn(200, 3, 9, 9) if layer == "conv" else torch.randn(200, 81, 6)
    step = ff.fishlegify(model.double(), ff.likelihoods.Gaussian())
    spec, q = step._runner.plan.blocks[0].spec, step.q["(root)"]
    assert spec is not None
    batch = step._runner.run(x.double(), None, twice=True)
    noise = step._noise.fork(1)
    z = batch.random_gradient(step.q, noise)[0]["(root)"]
    assert isinstance(z, LowRank) and z.d.shape[-2] == blocks._STATISTICS_ROWS
    a = spec.input_rows(x.double())
    d = spec.output_rows(batch._lin.pullback(torch.ones_like(batch._lin.outputs) / 200**0.5)[0]["(root)"][0])
    q.gather_(z)  # signs of each element are all that is random: with one, the diagonals are exact
    assert_close(q.cov_L, a.mT @ a / len(a), 0.35)
    assert_close(q.cov_R.diagonal(), (d.mT @ d).diagonal(), 1e-8)


@pytest.mark.parametrize("family", ["eigen", "scaled_kronecker", "diagonal"])
def test_families_that_keep_no_factors_are_probed_by_the_gradient_itself(family: str) -> None:
    step = ff.fishlegify(wide(), ff.likelihoods.Gaussian(), q=family)
    batch = step._runner.run(torch.randn(200, 140), torch.randn(200, 3), twice=True)
    g = batch.gradient()[1]
    assert all(x is g[k] for k, x in batch.probe(step.q).items())


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6)])
@pytest.mark.parametrize("ok", [None, True, False])
def test_opaque_operators_are_what_torch_takes_them_for(shape: tuple[int, ...], ok: bool | None) -> None:
    """Check schemas, mutations and the strides of results, with the transposed matrices that the right side passes."""
    allowed = None if ok is None else torch.tensor(ok)
    a, b = torch.randn(shape), torch.randn(shape).mT
    x, y = torch.randn(*shape[:-2], 2, 6), torch.randn(*shape[:-2], 2, 6)
    given: dict[str, tuple[object, ...]] = {
        "_square": ([b, a],),
        "_move_": (a.clone(), b, b.clone(), [a], x, y, torch.tensor(0.2), allowed),
        "average_product_": (a.clone(), x, y, torch.tensor(0.1), allowed),
        "_average_triangle_": (torch.randn(*shape[:-2], 7, 6), x, y, torch.tensor(0.1), allowed),
        "whitening_root": (a @ a.mT, torch.ones(shape[:-2]), a.clone()),
    }
    for name, arguments in given.items():
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.fishleg_func, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("q", ["kfac", "kronecker"])
def test_compiled_steps_with_long_sides_are_eager_ones(q: str) -> None:
    torch._dynamo.reset()
    models = [wide().double() for _ in range(2)]
    steps = [ff.fishlegify(m, ff.likelihoods.Gaussian(), q=q, update_aux_every=3) for m in models]
    x, y = randn(50, 140), randn(50, 3, seed=1)
    compiled = torch.compile(steps[1], fullgraph=True, backend="aot_eager")
    for _ in range(10):
        steps[0](x, y)
        compiled(x, y)
    for name, p in models[0].named_parameters():
        assert_close(models[1].get_parameter(name), p, 1e-9, name)
    before = steps[1].state_dict()  # reading it, or the natural gradient, changes nothing between compiled steps
    steps[1].natural_gradient(x, y)
    after = steps[1].state_dict()
    assert all(torch.equal(t, after[k]) for k, t in before.items() if isinstance(t, Tensor))


def test_a_direction_that_overflows_after_q_was_changed_is_refused() -> None:
    model = nn.Linear(3, 2)
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(), q="kronecker")
    for _ in range(52):
        step(torch.randn(5, 3), 1e4 * torch.randn(5, 2))
    for _ in range(2):
        step.q["(root)"].scale_(1e25)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="direction"):
            step(torch.zeros(5, 3), model(torch.zeros(5, 3)).detach() + 1e-30)
    assert all(map(torch.equal, before, model.parameters()))
    for _ in range(2):
        step.q["(root)"].scale_(1e-25)
    assert step(torch.randn(5, 3), torch.randn(5, 2)).isfinite()


def test_a_family_of_ones_own_steps_l_from_the_right_and_r_from_the_left() -> None:
    q = ff.families.Kronecker((3, 4), dtype=torch.float64)
    q.R.copy_(randn(3, 3) + 2 * torch.eye(3))
    q.L.copy_(randn(4, 4, seed=1) + 2 * torch.eye(4))
    twin = copy.deepcopy(q)
    gradients = {"L": randn(4, 4, seed=2), "R": randn(3, 3, seed=3)}
    gradients = {k: g + g.mT for k, g in gradients.items()}
    q.retract_(q.operator(), dict(gradients), torch.tensor(0.2).double())
    ff.QModule.retract_(twin, twin.operator(), dict(gradients), torch.tensor(0.2).double())
    assert_close(twin.L, q.L, 1e-12)
    assert_close(twin.R, q.R, 1e-12)


def test_probes_of_long_layers_lower_the_auxiliary_loss() -> None:
    """Learn Q of a layer with long sides from probes of few rows, where nothing else moves it."""
    model, count = nn.Linear(130, 130, bias=False).double(), 8 * blocks._PROBE_ROWS
    x = randn(count, 130) * torch.linspace(0.2, 2, 130).double()
    step = ff.fishlegify(model, ff.likelihoods.Gaussian(), q="kronecker", damping=1.0, aux_lr=0.3, step_norm=None)
    step.update_aux(x, randn(count, 130))
    first = step.accuracy(x, 4).overall
    for i in range(150):
        step.update_aux(x, randn(count, 130, seed=i))
    assert step.accuracy(x, 4).overall < 0.8 * first
