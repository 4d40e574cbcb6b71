"""Runs whose tokens are routed: what is drawn, that it repeats, and that it is for training alone."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.nodes.lora_trainer import Inputs, preflight
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.latent_packing import pack
from chroma_trainer.trainer_core.models.token_routing import Route
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.eval_loss import eval_loss
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop as loop_module
from chroma_trainer.trainer_core.train.step.batch import make_batch
from chroma_trainer.trainer_core.train.step.loop import micro_loss
from chroma_trainer.trainer_core.train.step.token_drop import draw_route, loss_weight_of_kept

from tests.workshop import EVALUATED

ROUTED = {"routed_share": 0.5, "route_first": 1, "route_last": -2}  # of 4 tokens and 4 blocks


def built(workshop, request):
    host = workshop.host()
    return build_run(plan_run(request, host), host, PhaseTimer())


def kept(share: float, weight: torch.Tensor | None, micro: int, batch: int = 3, height: int = 16) -> torch.Tensor:
    """(B, tokens), 1 where a token of a picture of 8 x height / 2 is kept."""
    config = TrainingConfig(routed_share=share, seed=3)
    route = draw_route(config, 6, torch.empty(batch, 16, height, 16), weight, micro)
    assert route is not None and (route.first, route.last) == (2, 4)
    assert (route.kept.diff(dim=1) > 0).all()  # rising, so none twice
    return torch.zeros(batch, 4 * height).scatter(1, route.kept, 1.0)


def test_each_token_is_as_likely_as_another():
    share = torch.cat([kept(0.75, None, micro) for micro in range(200)]).mean(0)
    assert share.mean() == pytest.approx(0.25) and (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 600) ** 0.5
    first, again, other = kept(0.5, None, 7), kept(0.5, None, 7), kept(0.5, None, 8)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_what_counts_more_in_the_loss_is_kept_first():
    weight = torch.zeros(3, 1, 16, 16)
    weight[0, :, :4, :8] = 1  # 8 of 64 tokens
    weight[1] = 1
    weight[2] = 0.2
    weight[2, :, :, 8:] = 1
    found = torch.stack([kept(0.75, weight, micro) for micro in range(200)]).mean(0)
    assert (found.sum(1).round() == 16).all()
    counted = weight[:, 0, ::2, ::2].flatten(1) > 0.5
    assert (found[0][counted[0]] == 1).all()
    rest = found[0][~counted[0]]
    assert (rest - 8 / 56).abs().max() < 5 * (8 / 56 / 200) ** 0.5
    assert (found[1] - 0.25).abs().max() < 5 * (0.25 / 200) ** 0.5
    assert 3.0 < found[2][counted[2]].mean() / found[2][~counted[2]].mean() < 5.0  # 5 for the first of the draws


def test_the_highest_share_leaves_a_token_of_the_smallest_picture():
    assert kept(0.9, None, 0, height=2).sum(1).tolist() == [1.0, 1.0, 1.0]


def test_the_loss_is_of_what_is_kept(workshop, monkeypatch):
    make = loop_module.make_batch
    made, share = built(workshop, workshop.request(**ROUTED)), []

    def spoilt(run_, micro):
        batch = make(run_, micro)
        assert batch.weight is not None and batch.route is not None
        share.append(batch.weight.mean().item())
        tokens = torch.zeros(len(batch.weight), batch.weight[0].numel() // 4).scatter(1, batch.route.kept, 1.0)
        assert torch.equal(pack(batch.weight), tokens[:, :, None].expand(-1, -1, 4))
        return replace(batch, velocity=torch.where(batch.weight == 0, 1e3, batch.velocity))

    before = micro_loss(made, 0).item()
    monkeypatch.setattr(loop_module, "make_batch", spoilt)
    assert micro_loss(made, 0).item() == before and share == [0.5]
    masked = torch.rand(2, 1, 8, 6)
    route = Route(0, 1, torch.tensor([[0, 5], [1, 2]]))
    plain, weighed = (loss_weight_of_kept(route, masked, weight) for weight in (None, masked))
    assert torch.equal(weighed, plain * masked) and plain.sum().item() == 16


@pytest.mark.slow
def test_it_repeats_and_resumes_to_the_same_bytes(workshop):
    values = {**ROUTED, "accumulation": 2, "steps": 4, "gradient_checkpointing": True}
    whole = run(workshop.request(**values), workshop.host())
    host = workshop.host().cancelling_at(2)
    with pytest.raises(Cancelled):
        run(workshop.request(**values), host)
    resumed = run(workshop.request(**values), host.cancelling_at(0))
    assert resumed.report["resumed_from"] == 2 and resumed.lora.sha256 == whole.lora.sha256
    assert run(workshop.request(**{**values, "routed_share": 0.0}), workshop.host()).losses != whole.losses


def test_without_a_share_all_is_as_it_was(workshop):
    plain, named = workshop.request(), workshop.request(route_first=0, route_last=3)
    assert plain.as_json() == named.as_json() and "routed_share" not in plain.as_json()["training"]
    assert plan_run(plain, workshop.host()).folder.name == plan_run(named, workshop.host()).folder.name
    made = built(workshop, named)
    assert make_batch(made, 0).route is None
    assert workshop.request(**ROUTED).as_json()["training"]["routed_share"] == 0.5


def test_only_training_is_routed(workshop):
    plain, routed = (built(workshop, workshop.request(**values, **EVALUATED)) for values in ({}, ROUTED))
    assert eval_loss(plain, workshop.host()) == eval_loss(routed, workshop.host())
    assert micro_loss(plain, 0).item() != micro_loss(routed, 0).item()


def test_pictures_that_keep_the_model_as_it_is_teach_nothing_at_the_start(workshop):
    """The base's prediction is made on the same route."""
    asked = workshop.request(steps=2, weight_decay=0.0, **ROUTED)
    (part,), (root,) = workshop.dataset.parts, workshop.dataset.roots
    host = workshop.host()
    run(replace(asked, dataset=DatasetConfig((replace(part, prior_preservation=True),), (root,))), host)
    assert [event.loss for event in host.all(StepReport)] == [0.0, 0.0]


def test_references_go_through_all_blocks(workshop, tiny_flux_model):
    request = workshop.request(model=replace(tiny_flux_model, flavour="kontext"), **ROUTED)
    part, (root,) = (
        replace(request.dataset.parts[0], references=str(Path(request.dataset.roots[0]))),
        request.dataset.roots,
    )
    made = built(workshop, replace(request, dataset=DatasetConfig((part,), (root,), (root,))))
    seen = []
    for block in FluxFamily().blocks(made.transformer)[:2]:
        block.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    batch = make_batch(made, 0)
    num_tokens = batch.x_sigma[0, 0].numel() // 4
    micro_loss(made, 0).backward()
    assert seen == [2 * num_tokens, num_tokens + num_tokens // 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"route_last": 4}, "route_last: is 4, but the model has 4 blocks; use 0 to 3, or -1 (the last) to -4"),
        ({"route_first": -5}, "route_first: is -5, but the model has 4 blocks"),
        (
            {"route_first": 3},
            "route_last: is -2, which is block 2 of 4, before route_first (3, block 3); use 3 or more",
        ),
    ],
)
def test_blocks_that_the_model_has_not_are_refused_before_it_loads(workshop, values, words):
    asked = workshop.request(**{**ROUTED, **values})
    with pytest.raises(UserError) as caught:
        plan_run(asked, workshop.host())
    assert words in str(caught.value) and len(caught.value.problems) == 1
    training = {name: getattr(asked.training, name) for name in (field.name for field in fields(TrainingConfig))}
    problems = preflight(Inputs(**training, model=asked.model, dataset=asked.dataset), workshop.host())
    assert [str(problem) for problem in problems] == [str(problem) for problem in caught.value.problems]
    plan_run(workshop.request(**{**values, "route_first": -100}), workshop.host())  # no share: nobody asks
