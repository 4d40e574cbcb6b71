"""Each optimiser of ours against its paper's formula, written here number by number in Python floats (fp64)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.optim.optimizer import effective_rate, evaluating, set_rate_
from chroma_trainer.trainer_core.registry import load
from torch import nn

ROWS, COLUMNS, STEPS, DECAY = 3, 4, 9, 0.05
Matrix = list[list[float]]
PLACES = [(i, j) for i in range(ROWS) for j in range(COLUMNS)]


def rate_of(step: int) -> float:
    return 0.1 / (1 + 0.2 * step)


def gradient_at(w: Matrix, step: int) -> Matrix:
    """Depends on the weights, so that an error of one step shows in all that follow; one step is much larger."""
    size = 30.0 if step == 5 else 1.0
    return [[size * math.sin(3 * w[i][j] + i - 0.7 * j + 0.3 * step) for j in range(COLUMNS)] for i in range(ROWS)]


def first_weights() -> Matrix:
    return [[math.cos(1.3 * i + 0.9 * j) for j in range(COLUMNS)] for i in range(ROWS)]


def zeros() -> Matrix:
    return [[0.0] * COLUMNS for _ in range(ROWS)]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def trained(name: str, scale: float = 1.0, **settings):
    """(weights after each step, weights to export, rates shown) of the optimiser of the registry."""
    param = nn.Parameter(torch.tensor(first_weights(), dtype=torch.float64))
    config = OptimizerConfig(optimizer=name, **settings)
    optimizer = load("optimizer", name).build([param], config, 1.0, DECAY, 0)
    path, shown = [], []
    for step in range(STEPS):
        set_rate_(optimizer, scale * rate_of(step))
        param.grad = torch.tensor(gradient_at(param.tolist(), step), dtype=torch.float64)
        optimizer.step()
        path.append(param.tolist())
        shown.append(effective_rate(optimizer, 1.0))
    with evaluating(optimizer):
        return path, param.tolist(), shown


def assert_near(one, two, rtol=1e-11):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=rtol, atol=1e-13)


def test_lion():
    w, m, expected = first_weights(), zeros(), []
    for step in range(STEPS):
        g = gradient_at(w, step)
        for i, j in PLACES:
            c = 0.9 * m[i][j] + 0.1 * g[i][j]
            w[i][j] -= rate_of(step) * (math.copysign(1, c) + DECAY * w[i][j])
            m[i][j] = 0.99 * m[i][j] + 0.01 * g[i][j]
        expected.append([list(row) for row in w])
    assert_near(trained("optimi-lion")[0], expected)


def test_stable_adamw():
    w, m, v, expected, shortened = first_weights(), zeros(), zeros(), [], 0
    for step in range(STEPS):
        t, g = step + 1, gradient_at(w, step)
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (0.9, 0.99))
        for i, j in PLACES:
            m[i][j] = b1 * m[i][j] + (1 - b1) * g[i][j]
            v[i][j] = b2 * v[i][j] + (1 - b2) * g[i][j] ** 2
        rms = math.sqrt(mean(g[i][j] ** 2 / max(v[i][j], 1e-12) for i, j in PLACES))
        rate = rate_of(step) / max(1, rms)
        shortened += rms > 1.5
        for i, j in PLACES:
            w[i][j] -= rate * (m[i][j] / (math.sqrt(v[i][j]) + 1e-6) + DECAY * w[i][j])
        expected.append([list(row) for row in w])
    assert shortened == 1  # the large gradient of step 5
    assert_near(trained("optimi-stableadamw")[0], expected)


@pytest.mark.parametrize(
    "growth, corrected, safe",
    [(0.0, False, False), (1.05, False, False), (0.0, True, False), (0.0, False, True), (1.05, True, True)],
)
def test_prodigy(growth, corrected, safe):
    x, x0, m, v, s = first_weights(), first_weights(), zeros(), zeros(), zeros()
    d, r, b3, coef, expected, shown = 1e-3, 0.0, math.sqrt(0.999), 0.8 * 10 ** (corrected + safe), [], []
    for step in range(STEPS):
        g, gamma, inner = gradient_at(x, step), 5 * rate_of(step), 0.0
        if corrected:
            gamma *= math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        for i, j in PLACES:
            m[i][j] = 0.9 * m[i][j] + 0.1 * d * g[i][j]
            v[i][j] = 0.999 * v[i][j] + 0.001 * d**2 * g[i][j] ** 2
            s[i][j] = b3 * s[i][j] + (1 - b3) * (1 if safe else gamma) * d**2 * g[i][j]
            inner += g[i][j] * (x0[i][j] - x[i][j])
        r = b3 * r + (1 - b3) * gamma * d**2 * inner
        for i, j in PLACES:
            x[i][j] -= gamma * d * (m[i][j] / (math.sqrt(v[i][j]) + d * 1e-8) + DECAY * x[i][j])
        estimate = coef * r / sum(abs(s[i][j]) for i, j in PLACES)
        d = max(d, min(estimate, growth * d) if growth else estimate)
        expected.append([list(row) for row in x])
        shown.append(d)
    assert shown[-1] > 1.04 * shown[0]
    settings = {"prodigy_growth": growth, "prodigy_bias_correction": corrected, "prodigy_safeguard_warmup": safe}
    path, _, found = trained("prodigy", 5.0, prodigy_d0=1e-3, prodigy_d_coef=coef, **settings)
    assert_near(path, expected)
    assert found == pytest.approx(shown, rel=1e-11)


def test_schedule_free():
    """With x, y and z written out; ours keeps y and z."""
    z, x, v, total, expected = first_weights(), first_weights(), zeros(), 0.0, []
    y = first_weights()
    for step in range(STEPS):
        t, g = step + 1, gradient_at(y, step)
        rate = rate_of(step) * math.sqrt(1 - 0.999**t)
        total += rate**2
        c = rate**2 / total
        for i, j in PLACES:
            v[i][j] = 0.999 * v[i][j] + 0.001 * g[i][j] ** 2
            z[i][j] -= rate * (g[i][j] / (math.sqrt(v[i][j]) + 1e-8) + DECAY * y[i][j])
            x[i][j] = (1 - c) * x[i][j] + c * z[i][j]
            y[i][j] = 0.1 * z[i][j] + 0.9 * x[i][j]
        expected.append([list(row) for row in y])
    path, exported, _ = trained("schedulefree-adamw")
    assert_near(path, expected)
    assert_near(exported, x)
    assert max(abs(exported[i][j] - path[-1][i][j]) for i, j in PLACES) > 1e-3


def outer(rows, columns):
    """V_ij = R_i C_j / sum R, of the sums of rows and of columns."""
    return [[rows[i] * columns[j] / sum(rows) for j in range(COLUMNS)] for i in range(ROWS)]


@dataclass
class Factors:
    """Sums of rows and columns, as the papers write them; ours keeps means."""

    rows: list[float] = field(default_factory=lambda: [0.0] * ROWS)
    columns: list[float] = field(default_factory=lambda: [0.0] * COLUMNS)

    def average(self, squares: Matrix, beta: float) -> Matrix:
        for i in range(ROWS):
            self.rows[i] = beta * self.rows[i] + (1 - beta) * sum(squares[i])
        for j in range(COLUMNS):
            self.columns[j] = beta * self.columns[j] + (1 - beta) * sum(squares[i][j] for i in range(ROWS))
        return outer(self.rows, self.columns)


def shortened(u: Matrix) -> Matrix:
    size = max(1.0, math.sqrt(mean(u[i][j] ** 2 for i, j in PLACES)))
    return [[value / size for value in row] for row in u]


def divided(g: Matrix, v: Matrix) -> Matrix:
    return [[g[i][j] / math.sqrt(v[i][j]) for j in range(COLUMNS)] for i in range(ROWS)]


@pytest.mark.parametrize("beta1", [0.0, 0.7])
@pytest.mark.parametrize("scaled", [False, True])
def test_adafactor(beta1, scaled):
    w, m, factors, expected = first_weights(), zeros(), Factors(), []
    for step in range(STEPS):
        g = gradient_at(w, step)
        v = factors.average([[x**2 + 1e-30 for x in row] for row in g], 1 - (step + 1) ** -0.8)
        u = shortened(divided(g, v))
        rate = rate_of(step) * (max(1e-3, math.sqrt(mean(w[i][j] ** 2 for i, j in PLACES))) if scaled else 1)
        for i, j in PLACES:
            m[i][j] = beta1 * m[i][j] + (1 - beta1) * u[i][j]
            w[i][j] -= rate * (m[i][j] + DECAY * w[i][j])
        expected.append([list(row) for row in w])
    assert_near(trained("adafactor", beta1=beta1, adafactor_scale_parameter=scaled)[0], expected)


def test_came():
    w, m, factors, strays, expected = first_weights(), zeros(), Factors(), Factors(), []
    for step in range(STEPS):
        g = gradient_at(w, step)
        u = shortened(divided(g, factors.average([[x**2 + 1e-30 for x in row] for row in g], 0.999)))
        for i, j in PLACES:
            m[i][j] = 0.9 * m[i][j] + 0.1 * u[i][j]
        stray = [[(u[i][j] - m[i][j]) ** 2 + 1e-16 for j in range(COLUMNS)] for i in range(ROWS)]
        d = divided(m, strays.average(stray, 0.9999))
        for i, j in PLACES:
            w[i][j] -= 0.01 * rate_of(step) * (d[i][j] + DECAY * w[i][j])
        expected.append([list(row) for row in w])
    assert_near(trained("came", 0.01)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["adafactor", "came"])
def test_factors_keep_almost_nothing(name):
    param = nn.Parameter(torch.ones(300, 200))
    optimizer = load("optimizer", name).build([param], OptimizerConfig(), 0.1, 0.0, 0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    sizes = {key: value.numel() for key, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}
    sizes.pop("m", 0)
    assert sizes and sum(sizes.values()) == 500 * (len(sizes) // 2)


def test_a_stack_of_matrices_is_each_of_them():
    """But for the shortening, which looks at all of them: gradients are small enough not to need it after the first step."""
    from chroma_trainer.trainer_core.optim.adafactor import factored_rsqrt, factored_state, update_factored_

    squares = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = factored_state("v", squares)
    update_factored_(whole, "v", squares, 0.5)
    for k in range(2):
        one = factored_state("v", squares[k])
        update_factored_(one, "v", squares[k], 0.5)
        torch.testing.assert_close(factored_rsqrt(whole, "v")[k], factored_rsqrt(one, "v"))
        mean_kept = factored_rsqrt(one, "v") ** -2
        torch.testing.assert_close(mean_kept.mean(-1), squares[k].mean(-1) / 2)
