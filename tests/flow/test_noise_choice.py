"""The noise that is nearest to the image."""

from __future__ import annotations

import torch
from chroma_trainer.trainer_core.flow.noise_choice import nearest_noise
from chroma_trainer.trainer_core.seeds import generator

X0 = torch.randn(16, 8, 8, generator=generator(0, "x0"))


def choose(count: int, seed: int = 0) -> torch.Tensor:
    return nearest_noise(X0, count, generator(seed, "noise", 3))


def test_one_noise_is_the_generators():
    assert torch.equal(choose(1), torch.randn(X0.shape, generator=generator(0, "noise", 3)))


def test_it_is_the_one_with_the_smallest_angle():
    rng = generator(0, "noise", 3)
    noises = [torch.randn(X0.shape, generator=rng) for _ in range(8)]
    cosines = torch.nn.functional.cosine_similarity(torch.stack(noises).flatten(1), X0.flatten()[None])
    assert torch.equal(choose(8), noises[int(cosines.argmax())]) and cosines.argmax() != 0


def test_it_depends_on_the_seed_alone():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = choose(16)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(choose(16), alone) and not torch.equal(choose(16, 1), alone)


def test_more_candidates_straighten_the_path():
    """The mean cosine of the chosen noise grows as the expected maximum of so many normals."""
    scale = X0.numel() ** 0.5
    means = []
    for count in (1, 4, 16):
        noises = (choose(count, seed) for seed in range(60))
        means.append(sum(float((n * X0).sum() / n.norm() / X0.norm()) for n in noises) / 60 * scale)
    assert abs(means[0]) < 0.4 and 0.7 < means[1] < 1.4 and 1.4 < means[2] < 2.1  # 0, 1.03 and 1.77
