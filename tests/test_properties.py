"""Properties that hold for every input: of the order of the data."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import BatchPlan, TrainingConfig


@st.composite
def plans(draw):
    sizes = {"batch_size": st.integers(1, 9), "accumulation_steps": st.integers(1, 5)}
    config = draw(st.builds(TrainingConfig, **sizes, seed=st.integers(0, 99)))
    return BatchPlan(draw(st.integers(1, 200)), config, draw(st.integers(1, 7)))


@given(plans(), st.integers(0, 3))
def test_an_epoch_uses_every_sample_once_however_many_processes_share_it(plan, epoch):
    used = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for rank in range(plan.world_size):
            used.update(pair for part in plan.micro_batches(step, rank) for pair in part.pairs)
    assert used == Counter((epoch, index) for index in range(plan.length))


@given(plans(), st.integers(0, 50))
def test_every_sample_of_a_step_weighs_the_same_however_many_processes_share_it(plan, step):
    passes = plan.config.accumulation_steps * plan.world_size
    alone = BatchPlan(plan.length, replace(plan.config, accumulation_steps=passes))
    shared = [part for rank in range(plan.world_size) for part in plan.micro_batches(step, rank)]
    assert sorted(shared) == alone.micro_batches(step)
    assert sum(part.weight * len(part.pairs) for part in shared) == pytest.approx(1)
    assert all(1 <= len(part.pairs) <= plan.config.batch_size for part in shared)
