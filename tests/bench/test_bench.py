from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import peak


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2]), *sys.path])


def row(bench, ratio, **more):
    return {"bench": bench, "peer": "p", "ours": 1, "theirs": 2, "ratio": ratio, "unit": "rows/s",
            **more}


def talks(count=12):
    return [[{"role": "user", "content": f"Say {w}"}, {"role": "assistant", "content": w * i}]
            for i, w in enumerate(["the list ", "an axis ", "values "] * (count // 3), 1)]


@pytest.fixture(scope="module")
def small_world():
    """A tiny base and two dozen rows, on whatever corpus there is."""
    from bench.world import Extent, World

    made = pytest.MonkeyPatch()
    made.setattr("bench.data.conversations", lambda rows: (talks(90)[:rows], "made up"))
    world = World("tiny", Extent(rows=90, warm=30, evals=6, set_rows=12, epochs=2, longest=64))
    yield world
    made.undo()


def test_a_new_run_replaces_its_bench_and_keeps_the_others(tmp_path):
    from bench.report import write

    path = tmp_path / "results" / "bench.json"
    write([row("b", 1.0), row("b", 2.0), row("a", 3.0)], path)
    write([row("b", 9.0)], path)
    found = [(r["bench"], r["ratio"]) for r in json.loads(path.read_text())]
    assert found == [("a", 3.0), ("b", 9.0)]


def test_a_skipped_bench_keeps_what_was_measured_elsewhere():
    from bench.report import empty_row, merged

    skipped = [empty_row("g", skipped="no GPU"), empty_row("h", skipped="no GPU")]
    found = merged([row("g", 4.0), empty_row("h", skipped="old")], skipped)
    assert [(r["bench"], r["ratio"], r.get("skipped")) for r in found] \
        == [("g", 4.0, None), ("h", None, "no GPU")]


def test_table_says_where_a_goal_is_missed():
    from bench.report import table

    rows = [row("ppl_vs_row", 1.99), row("ppl_vs_row", 2.0), row("other", None),
            row("ppl_vs_row", 9.0, failed="other values"), row("embed_vs_default", 1.0, goal=None)]
    ends = [line.rsplit("|", 2)[1].strip() for line in table(rows).splitlines()[2:]]
    assert ends == ["2.0 MISSED", "2.0 ok", "", "2.0 MISSED (not comparable)", ""]


def test_page_names_what_is_missed_what_was_not_run_and_each_machine():
    from bench.report import empty_row, page

    rows = [row("ppl_vs_row", 1.0, on="1m", machine={"cores": 2}, others=0.5, note="a | b"),
            row("ppl_padding", 1.1, machine={"cores": 16}),
            empty_row("sweep_gpu", skipped="no GPU here")]
    text = page(rows, ["ppl_vs_row", "knn_vs_faiss"])
    assert "Missed: `ppl_vs_row` (1m)." in text
    assert "- `sweep_gpu`: no GPU here\n- `knn_vs_faiss`: not run" in text
    assert "- Machine A: cores 2.\n- Machine B: cores 16." in text
    assert "| a \\| b | A | 0.5 |" in text


def test_only_takes_a_name_or_the_start_of_names(tmp_path, monkeypatch, capsys):
    from bench import __main__ as bench

    ran = []
    names = ("ppl_a", "ppl_a_60m", "knn")
    table = {n: (lambda n=n: ran.append(n) or [row(n, 1.0)]) for n in names}
    monkeypatch.setattr(bench, "found_benches", lambda: table)
    out = ["--out", str(tmp_path / "bench.json")]
    assert bench.main(["--only", "ppl_a", *out]) == 0 and ran == ["ppl_a"]
    assert bench.main(["--only", "ppl", *out]) == 0 and ran[1:] == ["ppl_a", "ppl_a_60m"]
    assert bench.main(["--only", "nothing", *out]) == 2
    assert "known: ['knn'" in capsys.readouterr().err


def test_benches_that_share_their_measurements_run_once(tmp_path, monkeypatch):
    from bench import __main__ as bench

    ran = []
    both = lambda: ran.append(1) or [row("a", 1.0), row("b", 2.0, seconds=None)]  # noqa: E731
    monkeypatch.setattr(bench, "found_benches", lambda: {"a": both, "b": both})
    assert bench.main(["--out", str(tmp_path / "b.json")]) == 0 and ran == [1]
    first, second = json.loads((tmp_path / "b.json").read_text())
    assert first["machine"]["cores"] and first["others"] >= 0
    assert second["seconds"] is None  # a row's own word goes before the run's


def test_a_failing_bench_is_said_and_the_others_run(tmp_path, monkeypatch, capsys):
    from bench import __main__ as bench
    from bench.pairs import Disagreement, Skipped

    def broken():
        raise Disagreement("MTLD values differ by 3")

    def elsewhere():
        raise Skipped("no GPU")

    monkeypatch.setattr(bench, "found_benches",
                        lambda: {"x": broken, "y": lambda: [row("y", 2.0)], "z": elsewhere})
    out = ["--out", str(tmp_path / "b.json")]
    assert bench.main(out) == 1
    assert "failed: Disagreement: MTLD values differ by 3" in capsys.readouterr().err
    x, y, z = json.loads((tmp_path / "b.json").read_text())
    assert x["ratio"] is None and "MTLD" in x["failed"]
    assert y["ratio"] == 2.0 and z["skipped"] == "no GPU"
    assert bench.main(["--only", "z", *out]) == 0  # a bench of another machine is no failure


def test_every_goal_belongs_to_a_bench_and_every_demanded_bench_is_there():
    from bench.__main__ import found_benches
    from bench.report import GOALS

    benches = found_benches()
    assert not set(GOALS) - set(benches)
    assert {"ppl_vs_file_order_60m", "ppl_vs_row_60m", "sweep_width", "sweep_gpu",
            "score_linear", "sweep_laptop"} <= set(benches)


def test_gpu_benches_are_skipped_with_a_reason(monkeypatch):
    import torch

    from bench.__main__ import found_benches, run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("ppl_gpu_matmul_share", "sweep_gpu"):
        (found,) = run([name], found_benches()[name])
        assert found["bench"] == name and "CUDA" in found["skipped"]


@pytest.mark.parametrize("ours,theirs", [
    ([1.0, 2.0], [1.0, 2.2]), ([1.0, np.nan], [1.0, 2.0]), ([np.nan], [np.nan]),
])
def test_sides_that_differ_may_not_be_compared(ours, theirs):
    from bench.pairs import Disagreement, largest_difference

    with pytest.raises(Disagreement, match="scores"):
        largest_difference(ours, theirs, 0.1, "scores")


def test_difference_leaves_out_what_neither_side_has():
    from bench.pairs import largest_difference

    found = largest_difference([1.0, np.nan, 3.0], [1.05, np.nan, 3.0], 0.1, "scores")
    assert found == pytest.approx(0.05)


def test_losses_must_agree_in_every_pair_and_training_must_have_moved_them():
    from bench.sweep import disagreement

    assert disagreement(5.0, [4.0, 4.1], [4.01, 4.1]) == {}
    assert "0.74%" in disagreement(5.0, [4.0, 4.1], [4.0, 4.07])["failed"]
    assert "0.0100 (ours) and -0.0050" in disagreement(4.02, [4.01], [4.025])["failed"]
    assert disagreement(4.0, [4.0], [4.0])["failed"]  # nothing was trained on either side
    assert disagreement(5.0, [float("nan")], [4.0])["failed"]


def test_both_sides_of_the_perplexity_bench_give_the_same_numbers():
    from bench import data, ppl
    from bench.models import build_lm
    from instructmining_core.indicators.turns import read

    lm = build_lm("tiny", data.texts(talks()), dtype="float32")
    read_talks = [read(messages) for messages in talks()]
    ours = ppl.ours(lm, read_talks)
    assert np.isfinite(ours).all()
    for rows_a_call in (1, 5):
        np.testing.assert_allclose(ppl.theirs(lm, read_talks, rows_a_call), ours, rtol=1e-5)


def test_padding_is_counted_where_tokens_enter_the_model():
    import torch

    from bench import data, ppl
    from bench.models import build_lm

    lm = build_lm("tiny", data.texts(talks()), dtype="float32")
    call = lambda: lm.model(torch.zeros(3, 7, dtype=torch.long))  # noqa: E731
    assert ppl._tokens_through(lm, call) == 21


def test_both_sides_of_the_unieval_bench_give_the_same_numbers():
    import torch

    from bench import data, indicators
    from instructmining_core.indicators.turns import read

    found = [read(messages) for messages in [*talks(), talks()[0][:1] + [
        {"role": "assistant", "content": ""}]]]
    model = indicators.random_t5(data.texts(talks()), "float32", width=64, layers=1)
    with torch.inference_mode():
        theirs = indicators.unieval_in_file_order(model, found)
    np.testing.assert_allclose(indicators._unieval(model, found), theirs, atol=1e-5)
    assert np.isnan(theirs[:, -1]).all() and np.nanstd(theirs) > 0


def test_neighbours_bench_is_exact_and_raises_where_it_is_not(monkeypatch):
    from bench import data, neighbours
    from bench.pairs import Disagreement

    rows = np.array([[0.0, 0], [3, 4], [0, 1], [0, 1]], dtype=np.float32)
    np.testing.assert_allclose(neighbours.in_float64(rows, [0, 2], 2), [[1, 1], [0, 1]])
    pytest.importorskip("faiss")
    points = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    monkeypatch.setattr(data, "embeddings", lambda size: (points, "made up"))
    assert neighbours.once(300, 1)["ratio"] > 0
    monkeypatch.setattr("instructmining_core.indicators.nearest.nearest",
                        lambda *args: (np.full((300, 6), 0.5), None))
    with pytest.raises(Disagreement, match="float64"):
        neighbours.once(300, 1)


def test_random_rows_are_unit_rows(monkeypatch):
    from bench import data

    monkeypatch.setattr(data, "shared_folder", lambda: None)
    found, told = data.embeddings(50)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert told == "50 random unit rows"


def test_slope_is_fitted_without_the_start_up():
    from bench.score import slope

    sizes = (1000, 10_000, 100_000, 1_000_000)
    assert slope(sizes, [3.1 + n * 1e-4 for n in sizes], 3.1) == pytest.approx(1)
    assert slope(sizes, [3.1 + n**1.5 * 1e-6 for n in sizes], 3.1) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="start-up"):
        slope(sizes, [3.0, 3.0, 3.0, 3.0], 3.1)


def test_rows_of_the_score_bench_are_all_different(tmp_path):
    from bench.score import write_rows

    write_rows(tmp_path / "r.jsonl", talks(3), 8)
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(lines) == 8 == len(set(lines))


def record(started, ended, **more):
    return {"started": f"2026-01-01T10:{started}Z", "ended": f"2026-01-01T10:{ended}Z",
            "hardware": {"cores": 2}, "versions": {"python": "3", "torch": "2"}, "status": "done",
            "spec": {"evals": {"eval_1": "", "eval_2": ""}, "base": {"dtype": "bfloat16"},
                     "purpose": "sweep"}, **more}


def test_laptop_time_is_from_the_first_start_to_the_last_end():
    from bench.laptop import from_records
    from bench.pairs import Skipped

    found = from_records([record("01:00", "01:03"), record("00:10", "01:05")], "there")
    assert found["ours"] == 56 and found["ratio"] == pytest.approx(360 / 56, rel=1e-3)
    assert found["machine"]["cores"] == 2 and "10:00:10" in found["note"]
    with pytest.raises(Skipped, match="interrupted for 115 s"):
        from_records([record("00:00", "00:05"), record("02:00", "02:05")], "there")


def test_a_ledger_counts_the_finished_runs_of_the_sweep():
    from bench.laptop import sweep_records

    changes = [{}, {"status": "failed"}, {"spec": {"purpose": "gate"}}]
    assert len(sweep_records(record("00:00", "00:01", **more) for more in changes)) == 1


def test_flop_of_training_by_hand(small_world):
    """One row of 3 tokens, 2 of them targets; hidden 32, MLP 64, 2 layers, rank 8, 512 words."""
    from dataclasses import replace

    from bench.matmul import frozen, training_flop
    from instructmining_core.data.tokenization import Encoded
    from instructmining_core.finetuning.lora import MultiLoRA

    lm = small_world.load("float32")
    adapters = MultiLoRA(lm.model, small_world.config, [0])
    row, config = Encoded((5, 6, 7), (False, True, True)), replace(small_world.config, epochs=2)
    square, wide, rank = 32 * 32, 32 * 64, config.rank
    layer = 4 * (4 * square + 3 * wide) + 6 * rank * (4 * 64 + 3 * 96)
    first = layer - 2 * 3 * square - 2 * rank * 3 * 32
    attention, head = 3 * 4 * 6 * 32 * 2, 4 * 2 * 32 * 512
    expected = 2 * (3 * (first + layer) + attention + head)
    assert training_flop(adapters, lm, [row], config) == expected
    assert sum(weight.numel() for weight, _ in frozen(adapters)) == 2 * (4 * square + 3 * wide)
    assert sum(w.numel() for w, below in frozen(adapters) if not below) == 3 * square


def test_shares_put_each_operation_where_it_belongs():
    from bench.parts import OTHER, PYTHON, shares

    def event(name, taken, above):
        return SimpleNamespace(name=name, self_cpu_time_total=taken, cpu_parent=above)

    whole = event("whole", 10, None)
    attention = event("part:attention", 5, whole)
    linear = event("aten::linear", 0, event("part:adapters", 0, whole))
    found = shares([
        whole, attention, event("aten::bmm", 20, attention), event("aten::mm", 30, linear),
        event("aten::silu", 15, whole), event("aten::mm", 99, None),
        event("Backward", 20, whole),
    ])
    assert found == {PYTHON: 0.35, "matrix products": 0.3, "attention": 0.2, OTHER: 0.15}


def test_profile_sees_every_part_of_a_training(small_world):
    from bench.parts import LABELS, OTHER, PYTHON, where_time_goes
    from instructmining_core.finetuning import packing

    before = packing.attend_packed
    parts, slower = where_time_goes(small_world)
    assert packing.attend_packed is before and slower > 0
    assert set(parts) == {*LABELS.values(), "matrix products", OTHER, PYTHON}
    assert sum(parts.values()) == pytest.approx(1, abs=1e-3) and max(parts.values()) < 1


def test_sweep_benches_run_at_tiny_size(small_world):
    from bench.gpu import SWEEP_GOAL, ppl_share, sweep_rows
    from bench.report import verdict

    rows = sweep_rows(small_world, (1, 2), repeats=2)
    assert [r["bench"] for r in rows] == [
        *["sweep_gpu"] * 2, *["sweep_gpu_width"] * 2, "sweep_gpu_matmul_share"]
    assert all(r["ratio"] > 0 and r["theirs"] > 0 for r in rows) and rows[2]["ratio"] == 1
    assert "so 129 in" in rows[0]["note"] and rows[0]["goal"] is None
    assert rows[1]["goal"] == SWEEP_GOAL and verdict(rows[1]).startswith("8.0")
    why = rows[0].get("failed", "final losses")  # a tiny model's few steps may differ by more
    assert why.startswith(("final losses", "training lowered"))
    share = ppl_share("tiny", 30, "cpu", repeats=1)
    assert share["ours"] > 0 and share["share"] == pytest.approx(share["ratio"] * 0.45, rel=1e-2)


def test_a_process_trains_and_multiplies_in_step_with_the_others(small_world):
    from bench.matmul import _work

    waits, results = [], []
    barrier = SimpleNamespace(wait=lambda timeout: waits.append(timeout))
    rows = [small_world.rows[name] for name in small_world.set(0)]
    _work(str(small_world.folder), small_world.config, rows, 2, barrier,
          SimpleNamespace(put=results.append))
    ((flop, trained, product_flop, multiplied),) = results
    assert len(waits) == 4 and len(trained) == len(multiplied) == 2
    assert 0 < product_flop < flop and min(*trained, *multiplied) > 0


def test_a_peak_is_the_process_own_not_that_of_its_parent():
    held = bytearray(600 * 2**20)  # in this process
    _, small = peak.measured("-c", "pass")
    _, large = peak.measured("-c", "x = bytearray(300 * 2**20)")
    assert len(held) > 0 and small < 0.2 < large < 0.5
    with pytest.raises(RuntimeError, match="broken"):
        peak.measured("-c", "raise SystemExit('broken')")


@pytest.fixture
def real_world(small_world):
    """The tiny base in the place of SmolLM2: 2 layers, adapters on the upper."""
    from bench.real import RealWorld
    from bench.world import Extent

    size = Extent(rows=60, warm=0, evals=6, set_rows=12, epochs=2, longest=64)
    return RealWorld(1, size, model=str(small_world.folder))


def test_an_adapter_above_kept_states_is_peft_s(real_world):
    from bench.real import above_kept_states

    found = above_kept_states(real_world, rows=12, evaluated=6)
    assert "failed" not in found and found["ratio"] >= 1 and found["ours"] <= 1e-5
    whole = above_kept_states(real_world.at(0), rows=12, evaluated=6)
    assert "cut" in whole["failed"]


def test_the_sweep_s_own_side_counts_the_pass_below_once(real_world, monkeypatch):
    import instructmining_core.files
    from bench import real

    monkeypatch.setattr(real, "SHORT", 3)
    before = instructmining_core.files.cache()
    ours = real.ours(real_world, "float32")
    assert len(ours.losses) == 3 and np.isfinite(ours.losses).all() and ours.seconds > 0
    assert "3 runs of ours" in ours.note and "layers below" in ours.note
    assert instructmining_core.files.cache() == before
    deep = real.ours(real_world.at(0), "float32")
    assert "below" not in deep.note and deep.losses != ours.losses


def test_real_rows_tell_both_losses_and_compare_like_with_like(real_world, monkeypatch):
    from bench import real

    monkeypatch.setattr(real, "base_loss", lambda world: 5.0)
    ours = real.Side(10.0, [4.0, 4.1], "2 runs of ours in 20 s")
    theirs = real.Side(50.0, [4.0], "1 of the peer's, 50 s each")
    made = real.compared("sweep_real_vs_trainer", real_world, ours, theirs, "defaults", "float32")
    assert made["ratio"] == 5 and made["ours"] == 360 and "failed" not in made
    assert "before training 5.0000, after 4.0000 / 4.1000 (ours), 4.0000 on" in made["note"]
    other = real.Side(50.0, [4.5], "")
    name, rest = "sweep_real_vs_all_layers", (real_world, ours, other, "tuned", "float32")
    assert "failed" in real.compared(name, *rest)
    assert "failed" not in real.compared(name, *rest, alike=False)


def test_a_large_file_is_carried_in_parts(tmp_path):
    from bench.carry import _in_parts

    whole, folder = tmp_path / "model.whl", tmp_path / "carried"
    whole.write_bytes(bytes(range(256)) * 4)
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "jobs").write_bytes(b"x" * 100)
    folders = _in_parts(whole, folder, 400)
    assert [one.name for one in folders] == ["1", "2", "3"]
    parts = sorted((path for one in folders for path in one.glob("part.*")), key=lambda p: p.name)
    assert b"".join(path.read_bytes() for path in parts) == whole.read_bytes()
    assert all(sum(p.stat().st_size for p in one.iterdir()) <= 400 for one in folders)
    with pytest.raises(SystemExit, match="mib"):
        _in_parts(whole, folder, 90)


def test_wana_s_scores_must_be_ours(tmp_path, monkeypatch):
    import pandas as pd

    from bench import wana
    from bench.pairs import Disagreement

    theirs = pd.DataFrame({"conditional_nll": [1.0, 2.0, 3.0],
                           "unconditional_nll": [2.0, 2.5, 3.0]})
    ours = pd.DataFrame({"log_ppl": [1.01, 2.0, 2.99], "ifd": np.exp([-1.0, -0.5, 0.0])})
    monkeypatch.setattr(wana, "ours_of", lambda rows, dtype: (ours, 2.0))
    found = wana.versus(tmp_path, "bfloat16", theirs, 10.0, "Alpaca")
    assert found["ratio"] == 5 and found["goal"] == 5 and "0.010 nats" in found["note"]
    monkeypatch.setattr(wana, "ours_of", lambda rows, dtype: (ours.assign(log_ppl=2.0), 2.0))
    with pytest.raises(Disagreement, match="nats"):
        wana.versus(tmp_path, "float32", theirs, 10.0, "Alpaca")
    monkeypatch.setattr(wana, "PEER", tmp_path / "wana")
    with pytest.raises(wana.Skipped, match="bench-peers"):
        wana.against_wana()
