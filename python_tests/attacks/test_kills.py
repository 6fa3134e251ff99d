"""The short form of kills.py: the long one is run by hand, its log is in results/."""

from __future__ import annotations

import pytest
import torch
from attacks import kills


@pytest.mark.parametrize("job", ["populate", "fit", "generate"])
def test_killed_at_random_moments(tmp_path, job):
    if torch.get_num_threads() > 1:
        pytest.skip("forks need torch without threads: run with -n2")
    work = kills.jobs(tmp_path)[job]
    (tmp_path / "campaign").mkdir()
    log = kills.campaign(job, work, tmp_path / "campaign", kills=12, seed=1)
    assert log.kills >= 12 and log.jobs >= 1
    assert log.clean, log
