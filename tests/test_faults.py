"""Real faults against real commands; ``python -m tests.faults --kills=100`` is the long form."""

import pytest
from faults import campaign
from faults.bench import TRAIN
from faults.faults import ALL, KILLS


def judge(results):
    failures = [line for result in results for line in result.failures]
    assert not failures, "\n".join(failures)
    for result in results:
        assert result.skipped or result.judged > 0, result.name
    return sum(len(result.injections) for result in results if result.name in KILLS)


@pytest.mark.processes
def test_one_of_each_fault_of_a_run(tmp_path):
    """For sweeps see test_launchers.py, for ramps test_ramp.py; the long form kills those too."""
    kinds = [name for name, (command, _) in ALL.items() if command == TRAIN]
    results = campaign.run_campaign(tmp_path, kills=2, others=1, seed=1, chain=2, kinds=kinds)
    assert judge(results) >= 2
    skipped = {result.name: result.skipped for result in results if result.skipped}
    assert set(skipped) <= {"full disk", "read-only work folder"}, skipped  # need mount


@pytest.mark.long
@pytest.mark.parametrize("seed", [2])
def test_a_hundred_kills(tmp_path, seed):
    results = campaign.run_campaign(tmp_path, kills=100, others=10, seed=seed)
    assert judge(results) >= 100
    assert {result.name for result in results} == set(ALL)
