"""The size curve at one number of steps: what each set is trained on."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from instructmining.experiments.comparisons import at_fixed_steps
from instructmining.profile import load_profile
from instructmining.study import PlannedRun


def test_at_fixed_steps_every_set_takes_as_many_and_every_row_is_seen_about_as_often():
    profile = load_profile("smoke")
    study, usual = SimpleNamespace(profile=profile), profile.finetune
    plans = [PlannedRun(tuple(f"row {i}" for i in range(size)),
                        {"pool": "p", "method": "random", "size": size, "seed": seed}, seed, seed)
             for size in (5, 8, 30, 43) for seed in (1, 2)]  # fmt: skip
    made = at_fixed_steps(study, plans)
    steps = max(usual.steps(profile.selection.size), -(-43 // usual.batch_size))
    assert {one.config.steps(len(one.row_hashes)) for one in made} == {steps}
    assert {len(one.row_hashes) for one in made} == {steps * usual.batch_size}
    for one, plan in zip(made, plans, strict=True):
        seen = Counter(one.row_hashes)
        assert set(seen) == set(plan.row_hashes)
        assert max(seen.values()) - min(seen.values()) <= 1
        assert one.label == plan.label | {"pool": f"p, {steps} steps"}
        assert (one.init_seed, one.config.learning_rate) == (plan.init_seed, usual.learning_rate)
    assert made[4].row_hashes != made[5].row_hashes  # what is seen once more hangs on the seed
