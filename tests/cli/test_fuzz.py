"""What is read from outside, of any content, is read or refused in words."""

from __future__ import annotations

import copy
import json
import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fuzz import SHARES, Fuzzer
from instructmining.profile import PRESETS, load_profile
from instructmining_core.config import InstructMiningError
from instructmining_core.regression.rule_card import load_rule

from .test_cli import RULE

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([2**70, "1e999", "../x", "standin:base", []]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner,
                                                                max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value, path=()):
    yield path
    for key, inner in (value.items() if isinstance(value, dict) else
                       enumerate(value) if isinstance(value, list) else ()):  # fmt: skip
        yield from places(inner, (*path, key))


def changed(draw, whole):
    """`whole` with a few of its parts put in another's place or taken out."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(whole))))
        if not path:
            whole = draw(VALUES)
            continue
        holder = whole
        for key in path[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[path[-1]] = draw(VALUES)
        else:
            del holder[path[-1]]
    return whole


def loaded_or_refused(load, path, text):
    path.write_text(text)
    try:
        load(str(path))
    except InstructMiningError as error:
        assert str(error)


@FUZZ
@given(st.data())
def test_any_rule_card_is_loaded_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    loaded_or_refused(load_rule, path, json.dumps(changed(data.draw, RULE)))


@FUZZ
@given(st.data())
def test_any_profile_is_loaded_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    preset = yaml.safe_load((PRESETS / "smoke.yaml").read_text())
    loaded_or_refused(load_profile, path, yaml.safe_dump(changed(data.draw, preset)))


@pytest.mark.parametrize("kind", SHARES)
def test_a_bounded_run_of_the_fuzzer_finds_nothing(tmp_path, kind):
    fuzzer, rng = Fuzzer(tmp_path), random.Random(kind)
    for _ in range({"bytes": 400, "bank": 100, "rule card": 100}.get(kind, 20)):
        content, read = fuzzer.kinds[kind](rng)
        try:
            read()
        except InstructMiningError as error:
            assert str(error)
        except Exception as error:
            raise AssertionError(content[:500]) from error
