"""Intervals over samples: Student's where all samples have one token, wider means nothing else."""

import math

import numpy as np
import scipy.stats
import torch

from rlhf_exp.functional.intervals import ratio_means


def test_one_token_a_sample_gives_students_interval() -> None:
    values = torch.tensor([0.3, 1.1, -0.4, 2.0, 0.9])
    means = ratio_means(values[:, None], torch.ones(5, 1))
    error = np.std(values.numpy(), ddof=1) / math.sqrt(5)
    low, high = scipy.stats.t.interval(0.95, 4, loc=values.mean().item(), scale=error)
    np.testing.assert_allclose([float(x) for x in means], [values.mean(), low, high], rtol=1e-5)


def test_samples_of_different_lengths_by_hand() -> None:
    sums, counts = torch.tensor([[6.0, 0.0], [2.0, 5.0], [0.0, 1.0]]), torch.tensor(
        [[3.0, 0.0], [1.0, 2.0], [0.0, 4.0]]
    )  # fmt: skip
    means = ratio_means(sums, counts)
    # Group 0 has two tokens' samples, both of mean 2; group 1 means 6 / 6, residuals 3 and -3.
    assert means.mean.tolist() == [2, 1]
    assert means.low[0] == means.high[0] == 2
    reach = scipy.stats.t.ppf(0.975, 1) * math.sqrt(2 / 1 * 18) / 6
    np.testing.assert_allclose(means.high[1], 1 + reach, rtol=1e-5)
    np.testing.assert_allclose(means.low[1], 1 - reach, rtol=1e-5)


def test_unknown_ends() -> None:
    means = ratio_means(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0, 0]]))
    assert means.mean[0].isnan()
    assert means.mean[1] == 0.5
    assert means.low.isnan().all()
    assert means.high.isnan().all()


def test_it_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 6, (2000, 8), generator=generator).float()
    level = 0.5 + torch.randn(2000, 8, generator=generator)  # of a whole sample
    means = [ratio_means((level * counts)[i, :, None], counts[i, :, None]) for i in range(2000)]
    covered = sum(bool(m.low < 0.5) and bool(m.high > 0.5) for m in means) / 2000
    assert 0.91 < covered < 0.97
