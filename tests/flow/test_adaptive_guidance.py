import pytest
import torch
from chroma_trainer.trainer_core.flow.adaptive_guidance import AdaptiveGuidance, guide, similarity, stretch

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
EULER = SIGMAS[:-1]
HEUN = [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]  # its last step has no correction
DPM_2 = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]  # a midpoint in each step but the last


class Model:
    """Denoised latents whose similarity rises as sigma falls. Remembers which evaluations had the negative prompt."""

    def __init__(self, similar_from=-1.0):
        self.similar_from, self.asked = similar_from, []
        self.cond = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.uncond = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def at(self, sigma):
        def predict(with_negative):
            self.asked.append(with_negative)
            uncond = self.cond * 1.001 if sigma <= self.similar_from else self.uncond
            return self.cond, uncond if with_negative else None

        return predict


def asked(guidance, levels, similar_from=-1.0, start_sigma=1.0):
    model, run = Model(similar_from), guidance.start(SIGMAS, start_sigma)
    for sigma in levels:
        run.denoise(sigma, model.at(sigma))
    assert (run.both, run.alone) == (model.asked.count(True), model.asked.count(False))
    return model.asked, run


def test_guide_at_the_known_strengths():
    cond, uncond = Model().cond, Model().uncond
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), 3 * cond - 2 * uncond)


def test_similarity_is_the_cosine_of_the_whole_batch():
    cond, uncond = Model().cond, Model().uncond
    assert similarity(cond, 5 * cond) == pytest.approx(1)
    assert similarity(cond, -cond) == pytest.approx(-1)
    expected = (cond * uncond).sum() / (cond.norm() * uncond.norm())
    assert similarity(cond, uncond) == pytest.approx(expected.item(), rel=1e-5)


def test_stretch_keeps_the_mean_and_bounds_the_deviation():
    cond = Model().cond * 4 + 0.7
    out = stretch(cond, 1.5)
    torch.testing.assert_close(out.mean((1, 2, 3)), cond.mean((1, 2, 3)))
    torch.testing.assert_close(out.std((1, 2, 3)), 1.5 * cond.std((1, 2, 3)).sqrt())


def test_every_step_is_guided_until_the_threshold():
    assert asked(AdaptiveGuidance(), EULER)[0] == [True] * 5


def test_the_step_that_reaches_the_threshold_is_still_guided():
    model = Model(similar_from=0.6)
    run = AdaptiveGuidance(cfg=3.0).start(SIGMAS)
    outs = [run.denoise(sigma, model.at(sigma)) for sigma in EULER]
    assert model.asked == [True, True, True, False, False]
    assert torch.equal(outs[2], guide(model.cond, model.cond * 1.001, 3.0))
    assert torch.equal(outs[3], model.cond)
    assert run.share_skipped == pytest.approx(0.4)


def test_threshold_1_never_settles():
    assert asked(AdaptiveGuidance(threshold=1.0), EULER, similar_from=1.0)[0] == [True] * 5


def test_heun_keeps_or_drops_guidance_by_whole_steps():
    calls, run = asked(AdaptiveGuidance(), HEUN, similar_from=0.6)
    # 0.6 is first seen in the correction of step 1, which belongs to step 1: step 2 goes without
    assert calls == [True] * 4 + [False] * 5 and run.settled_step == 1


def test_midpoints_belong_to_their_step():
    calls, run = asked(AdaptiveGuidance(), DPM_2, similar_from=0.7)
    assert calls == [True] * 4 + [False] * 5 and run.settled_step == 1


def test_initial_steps_are_counted_as_steps_not_evaluations():
    guidance = AdaptiveGuidance(initial_disabled_steps=2)
    assert asked(guidance, EULER)[0] == [False, False, True, True, True]
    assert asked(guidance, HEUN)[0] == [False] * 4 + [True] * 5
    assert asked(guidance, DPM_2)[0] == [False] * 4 + [True] * 5


def test_a_second_run_starts_afresh():
    guidance = AdaptiveGuidance(initial_disabled_steps=1)
    first, _ = asked(guidance, EULER, similar_from=0.4)
    assert first == [False, True, True, True, False]
    assert asked(guidance, EULER, similar_from=0.4)[0] == first


def test_guidance_starts_at_its_noise_level():
    assert asked(AdaptiveGuidance(cfg_start_pct=0.4), EULER, start_sigma=0.6)[0] == [False, False, True, True, True]
    assert asked(AdaptiveGuidance(cfg_start_pct=0.0), EULER, start_sigma=0.6)[0] == [True] * 5


def test_cfg_1_never_asks_for_the_negative_prompt():
    assert asked(AdaptiveGuidance(cfg=1.0), EULER)[0] == [False] * 5


def test_stretching_begins_after_the_threshold_only():
    guidance, model = AdaptiveGuidance(uncond_zero_scale=1.2, initial_disabled_steps=1), Model(similar_from=0.8)
    run = guidance.start(SIGMAS)
    outs = [run.denoise(sigma, model.at(sigma)) for sigma in EULER]
    assert torch.equal(outs[0], model.cond)
    assert torch.equal(outs[2], stretch(model.cond, 1.2))


def test_levels_that_went_through_other_arithmetic_are_recognised():
    levels = [float(torch.tensor(sigma)) * (1 + 1e-7) for sigma in EULER]
    assert asked(AdaptiveGuidance(initial_disabled_steps=2), levels)[0] == [False, False, True, True, True]


def test_nothing_is_changed_in_place():
    guidance, model = AdaptiveGuidance(uncond_zero_scale=1.0), Model(similar_from=0.8)
    cond, uncond = model.cond.clone(), model.uncond.clone()
    run = guidance.start(SIGMAS)
    for sigma in EULER:
        run.denoise(sigma, model.at(sigma))
    assert torch.equal(cond, model.cond) and torch.equal(uncond, model.uncond)
