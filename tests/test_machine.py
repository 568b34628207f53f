"""What the machine offers, where the system says it and where it does not."""

import os

import pytest

from ct_audio.common.machine import usable_cpus


def test_cpus_are_those_that_the_process_is_bound_to(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {2, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cpus() == 3


@pytest.mark.parametrize(("there", "expected"), [(6, 6), (None, 1)])
def test_without_affinity_all_cpus_count(monkeypatch, there, expected):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    assert usable_cpus() == expected
