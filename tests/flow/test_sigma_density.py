import math

import pytest
import torch
from chroma_trainer.trainer_core.config.training import SIGMA_DENSITIES
from chroma_trainer.trainer_core.flow.sigma_density import (
    DENSITIES,
    SCHNELL_SIGMAS,
    Chroma,
    Listed,
    LogitNormal,
    Mode,
    auto_shift,
    density,
    shift_sigma,
)

CASES = [(name, shift) for name in DENSITIES for shift in (1.0, 0.4, 3.158)]
KS_1E6 = 2.6  # the Kolmogorov distribution exceeds this once in a million; the seed is fixed


def grid(n=20001):
    return torch.linspace(0, 1, n, dtype=torch.float64)


@pytest.mark.parametrize(("edge", "shift"), [(256, 1.6487), (512, 1.8776), (1024, 3.1582)])
def test_shift_0_follows_the_size_of_the_picture(edge, shift):
    by_size = density("logit-normal", 0).at((edge // 16) ** 2)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(by_size.quantile(u), density("logit-normal", shift).quantile(u), atol=1e-4)
    assert density("chroma", 2.0).at(64) is not None and density("chroma", 1.0).at(64) is density("chroma", 1.0)


def test_every_name_of_the_settings_has_a_density():
    assert tuple(DENSITIES) == SIGMA_DENSITIES


@pytest.mark.parametrize("name, shift", CASES)
def test_samples_follow_the_cdf(name, shift):
    n = 40_000
    sigma = density(name, shift).sample(n, torch.Generator().manual_seed(5))
    assert sigma.dtype == torch.float32 and sigma.shape == (n,)
    assert sigma.min() >= 0 and sigma.max() <= 1 and sigma.isfinite().all()
    ranked = density(name, shift).cdf(sigma.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((ranked - steps[:-1]).abs().max(), (ranked - steps[1:]).abs().max())
    assert distance * math.sqrt(n) < KS_1E6


@pytest.mark.parametrize("name, shift", CASES)
def test_pdf_is_the_slope_of_the_cdf(name, shift):
    p, h = density(name, shift), 1e-6
    sigma = grid(1999)[20:-20]
    if name == "quadratic_tail_legacy":  # its two jumps have no slope
        jumps = shift_sigma(torch.tensor([[0.25], [0.75]], dtype=torch.float64), shift)
        sigma = sigma[((sigma - jumps).abs() > 2 * h).all(0)]
    slope = (p.cdf(sigma + h) - p.cdf(sigma - h)) / (2 * h)
    torch.testing.assert_close(p.pdf(sigma), slope, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name, shift", CASES)
def test_cdf_rises_from_0_to_1(name, shift):
    shares = density(name, shift).cdf(grid())
    assert shares[0] == pytest.approx(0, abs=1e-12) and shares[-1] == pytest.approx(1, abs=1e-12)
    assert (shares.diff() >= 0).all() and shares.isfinite().all()


@pytest.mark.parametrize("name, shift", CASES)
def test_quantile_undoes_the_cdf_and_holds_at_the_ends(name, shift):
    p, u = density(name, shift), grid(1001)
    sigma = p.quantile(u)
    assert sigma.isfinite().all() and sigma.min() >= 0 and sigma.max() <= 1
    assert p.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0, 1], abs=1e-12)
    torch.testing.assert_close(p.cdf(sigma), u, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DENSITIES)
def test_unshifted_densities_are_symmetric(name):
    p, sigma = density(name), grid(998)[1:-1]  # none of these is on a jump
    torch.testing.assert_close(p.pdf(sigma), p.pdf(1 - sigma), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(p.cdf(sigma), 1 - p.cdf(1 - sigma), rtol=0, atol=1e-12)


def test_chroma_is_the_density_of_the_original_run():
    sigma = grid(11)
    expected = (2 - 7.7 * (sigma - 0.5) ** 2) / 1.3583
    torch.testing.assert_close(Chroma().pdf(sigma), expected, rtol=5e-5, atol=0)
    assert Chroma().pdf(sigma).min() == pytest.approx(0.0552, abs=1e-4)


def test_chroma_inverts_to_the_last_bits_at_the_tails():
    u = torch.tensor([1e-12, 1e-6, 1 - 1e-6, 1 - 1e-12], dtype=torch.float64)
    torch.testing.assert_close(Chroma().cdf(Chroma().quantile(u)), u, rtol=0, atol=1e-15)


def test_logit_normal_is_the_sigmoid_of_a_normal():
    torch.manual_seed(0)
    drawn = torch.sigmoid(0.3 + 0.7 * torch.randn(200_000, dtype=torch.float64))
    for s in (0.2, 0.5, 0.8):
        share = LogitNormal(0.3, 0.7).cdf(torch.tensor(s, dtype=torch.float64)).item()
        assert (drawn <= s).double().mean().item() == pytest.approx(share, abs=0.005)
    assert torch.equal(density("sigmoid").cdf(grid()), density("logit-normal").cdf(grid()))


def test_mode_is_the_papers_map():
    u = grid(101)
    papers = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(Mode(1.29).quantile(1 - u), papers, rtol=0, atol=1e-14)


def test_quadratic_tail_visits_the_tails_more_and_leaves_nothing_out():
    p = density("quadratic_tail")
    tenth, middle = p.cdf(torch.tensor([0.1, 0.45, 0.55], dtype=torch.float64)).split([1, 2])
    assert tenth.item() == pytest.approx(math.sqrt(0.05))  # more than twice the 0.1 of uniform
    assert (middle[1] - middle[0]).item() > 0.05
    assert p.pdf(grid()).min() >= 0.5
    assert p.pdf(torch.tensor([0.5 - 1e-9, 0.5 + 1e-9])).tolist() == pytest.approx([0.5, 0.5])


def test_the_legacy_remap_has_its_hole_and_says_so():
    p = density("quadratic_tail_legacy")
    sigma = p.sample(20_000, torch.Generator().manual_seed(0))
    assert not ((sigma >= 0.25) & (sigma < 0.75)).any()
    assert "[0.25, 0.75)" in p.warning and p.warning == density("quadratic_tail_legacy", 2.0).warning
    assert all(not density(name).warning for name in DENSITIES if name != "quadratic_tail_legacy")


def test_one_generator_gives_one_sequence():
    first, second = (density("chroma").sample(5, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert density("chroma").sample(1, torch.Generator().manual_seed(9)) == first[0]


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    sigma = grid(101)
    for shift in (0.25, 1.0, 3.0):
        shifted = shift_sigma(sigma, shift)
        assert shifted[0] == 0 and shifted[-1] == 1
        torch.testing.assert_close(shift_sigma(shifted, 1 / shift), sigma, rtol=0, atol=1e-15)
    assert shift_sigma(torch.tensor(0.5), 3.0) == 0.75
    assert shift_sigma(sigma, 1.0) is sigma


def test_shifted_samples_are_the_samples_shifted():
    plain = density("chroma").sample(100, torch.Generator().manual_seed(3))
    shifted = density("chroma", 3.0).sample(100, torch.Generator().manual_seed(3))
    torch.testing.assert_close(shifted, shift_sigma(plain, 3.0), rtol=1e-6, atol=0)


def test_auto_shift_at_the_known_resolutions():
    tokens = [(edge // 16) ** 2 for edge in (256, 512, 1024)]
    assert [auto_shift(n) for n in tokens] == pytest.approx([1.6487, 1.8776, 3.1582], abs=1e-4)


def test_schnells_levels_come_as_often_as_listed():
    p = Listed(SCHNELL_SIGMAS)
    sigma = p.sample(20_000, torch.Generator().manual_seed(0))
    assert sigma.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert (sigma == 1).double().mean() == pytest.approx(0.7, abs=0.01)
    assert p.cdf(torch.tensor([0.0, 0.25, 0.6, 0.99, 1.0])).tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 1])
    assert p.quantile(torch.tensor([0.0, 1.0])).tolist() == [0.25, 1.0]


def test_a_list_has_no_density():
    with pytest.raises(NotImplementedError):
        Listed([0.5]).pdf(grid())
