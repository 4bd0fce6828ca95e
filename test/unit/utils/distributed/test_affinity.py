"""Cores of each rank: equal stretches, in the order of the cards, never too few."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.distributed.processes import FEWEST_CORES, bound_elsewhere, share_of_cores


def test_ranks_get_stretches_in_the_order_of_their_cards():
    cores = set(range(192))
    shares = [share_of_cores(cores, part, 8) for part in range(8)]
    assert shares[0] == set(range(24)) and shares[7] == set(range(168, 192))
    assert set.union(*shares) == cores


def test_what_the_process_may_not_use_is_not_shared_out():
    assert share_of_cores(set(range(100, 108)), 1, 2) == {104, 105, 106, 107}


@pytest.mark.parametrize("cores, parts", [(2, 2), (8, 8), (4 * FEWEST_CORES - 1, 4)])
def test_few_cores_stay_with_all(cores, parts):
    assert share_of_cores(set(range(cores)), 1, parts) == set(range(cores))


@pytest.mark.parametrize("environ, elsewhere", [
    ({}, False), ({"CPU_AFFINITY_CONF": ""}, False), ({"CPU_AFFINITY_CONF": "0"}, False),
    ({"CPU_AFFINITY_CONF": "1"}, True), ({"CPU_AFFINITY_CONF": "2,npu0:0-3"}, True),
    ({"CPU_AFFINITY": "off"}, True), ({"CPU_AFFINITY": "on"}, False)])
def test_one_mechanism_at_a_time(environ, elsewhere):
    assert bound_elsewhere(environ) is elsewhere


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
@pytest.mark.parametrize("environ", [{}, {"CPU_AFFINITY": "off"}])
def test_a_bound_process_hands_it_on(environ):
    code = ("import os, subprocess, sys\nfrom utils.distributed import affinity\n"
            "affinity.FEWEST_CORES = 1\n"
            f"affinity.bind(1, 2, dict({environ}))\n"
            "subprocess.run([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'])"
            )
    shown = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), stdout=subprocess.PIPE,
                           universal_newlines=True).stdout
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // 2
    expected = set(cores[each:2 * each]) if each and not environ else set(cores)
    assert eval(shown) == expected  # noqa: S307
