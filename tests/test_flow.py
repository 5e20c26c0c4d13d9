"""Rectified flow: the path, its target, and the sampler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexlam_fast.flow import euler, interpolate, logit_normal, velocity_of


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    frame = torch.rand(5, 3, 4, 4, dtype=torch.float64, generator=generator) * 2 - 1
    return frame, torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=generator)


def test_the_path_runs_straight_from_noise_to_the_frame() -> None:
    frame, noise = pair()
    tau = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    sample = interpolate(frame, noise, tau)
    assert torch.equal(sample.x[0], noise[0])
    assert torch.equal(sample.x[4], frame[4])
    assert torch.allclose(sample.x[1], 0.75 * noise[1] + 0.25 * frame[1])
    assert torch.equal(sample.target, frame - noise)
    assert torch.equal(sample.tau, tau)


def test_the_target_is_the_slope_of_the_path() -> None:
    frame, noise = pair()
    tau = torch.full((5,), 0.4, dtype=torch.float64)
    slope = (interpolate(frame, noise, tau + 1e-3).x - interpolate(frame, noise, tau - 1e-3).x) / 2e-3
    assert torch.allclose(slope, interpolate(frame, noise, tau).target, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 8, 28])
def test_euler_along_the_true_velocity_arrives_at_the_frame(steps: int) -> None:
    frame, noise = pair()
    assert torch.allclose(euler(lambda x, tau: frame - noise, noise, steps), frame, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_predicted_frame_means_the_velocity_that_leads_there(steps: int) -> None:
    frame, noise = pair()
    tau = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.94], dtype=torch.float64)
    sample = interpolate(frame, noise, tau)
    assert torch.allclose(velocity_of(frame, sample.x, tau), sample.target, atol=1e-12)
    assert torch.allclose(euler(lambda x, t: velocity_of(frame, x, t.double()), noise, steps), frame, atol=1e-6)


def test_the_velocity_stays_finite_where_the_path_ends() -> None:
    frame, noise = pair()
    velocity = velocity_of(frame, noise, torch.ones(5, dtype=torch.float64))
    assert torch.allclose(velocity, (frame - noise) / 0.05)


def test_euler_visits_equal_steps_from_zero() -> None:
    seen = []

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        seen.append(tau.tolist())
        return torch.ones_like(x)

    out = euler(velocity, torch.zeros(2, 1, 1, 1), 4)
    assert seen == [[0.0, 0.0], [0.25, 0.25], [0.5, 0.5], [0.75, 0.75]]
    assert out.flatten().tolist() == [1.0, 1.0]


def test_euler_errs_by_the_first_order_of_the_step() -> None:
    # dx/dt = x from 1: n steps give (1 + 1/n)^n, the exact answer is e
    for steps in (1, 4, 16):
        out = euler(lambda x, tau: x, torch.ones(1, dtype=torch.float64), steps)
        assert math.isclose(float(out), (1 + 1 / steps) ** steps, rel_tol=1e-12)


def test_flow_times_are_logit_normal() -> None:
    # the quantiles of logit-normal(0, 1) are the sigmoids of the normal ones
    tau = logit_normal(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(tau.min()) > 0
    assert float(tau.max()) < 1
    logit = (tau / (1 - tau)).log()
    assert abs(float(logit.mean())) < 0.01
    assert abs(float(logit.std()) - 1) < 0.01
    assert abs(float((tau < 0.2689).float().mean()) - 0.1587) < 0.005
    shifted = logit_normal(torch.linspace(-3, 3, 7), mean=-1.5)
    assert torch.allclose((shifted / (1 - shifted)).log(), torch.linspace(-4.5, 1.5, 7), atol=1e-5)
