"""Timestep samplers."""

from __future__ import annotations

import pytest
import torch

from model_core.training.timesteps import LossSecondMomentSampler, UniformSampler


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_uniform_covers_all_timesteps_with_weight_one() -> None:
    timesteps, weights = UniformSampler(10).sample(1000, generator())
    assert set(timesteps.tolist()) == set(range(10))
    assert torch.equal(weights, torch.ones(1000))


def test_second_moment_is_uniform_until_warm() -> None:
    sampler = LossSecondMomentSampler(4, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.ones(7))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_second_moment_follows_the_last_losses_and_keeps_the_expectation() -> None:
    sampler = LossSecondMomentSampler(2, history=2, uniform_share=0.01)
    sampler.update(torch.tensor([0, 0, 1, 1]), torch.tensor([9.0, 9.0, 1.0, 1.0]))
    sampler.update(torch.tensor([0, 0]), torch.tensor([3.0, 3.0]))  # pushes the nines out
    p = sampler.probabilities()
    assert p.tolist() == pytest.approx([0.75 * 0.99 + 0.005, 0.25 * 0.99 + 0.005])
    timesteps, weights = sampler.sample(4000, generator())
    losses = torch.tensor([3.0, 1.0])
    assert float((losses[timesteps] * weights).mean()) == pytest.approx(2.0, rel=0.02)


def test_second_moment_history_survives_a_resume() -> None:
    sampler, resumed = (LossSecondMomentSampler(2, history=1) for _ in range(2))
    sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    resumed.load_state_dict(sampler.state_dict())
    assert torch.equal(resumed.probabilities(), sampler.probabilities())
