"""An output folder appears whole or not at all, replaces only what is ours, and its manifest tells the truth."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from qmerge import __version__
from qmerge.adapters.adapter import open_adapter
from qmerge.errors import Refused
from qmerge.store import hub, publish
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.manifest import build_manifest, digest_files, input_digests, portable, read_manifest, verify_files
from qmerge.store.publish import OutputFolder, check_output


def make(out, inputs=(), overwrite=False, text="weights"):
    with OutputFolder(out, list(inputs), overwrite) as folder:
        (folder.path / "model.safetensors").write_text(text)
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "x.jinja").write_text("{{ x }}")
        folder.commit(build_manifest(folder.path, inputs={}, recipe={"format": "nf4"}, versions={}))


def refusal(out, inputs=(), overwrite=False):
    before = sorted(os.walk(out.parent)) if out.parent.exists() else None
    with pytest.raises(Refused) as caught:
        check_output(out, inputs, overwrite)
    assert before == (sorted(os.walk(out.parent)) if out.parent.exists() else None)
    return str(caught.value)


def test_commit(tmp_path):
    """The folder must be there whole, with a manifest that fits, and nothing beside it."""
    make(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and verify_files(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors", "sub"]


def test_parents_are_made_and_taken_back(tmp_path):
    """A failed run must not leave empty folders; a good one makes the folders that the path needs."""
    with pytest.raises(KeyError), OutputFolder(tmp_path / "a" / "b" / "out", []):
        raise KeyError
    assert os.listdir(tmp_path) == []
    make(tmp_path / "a" / "b" / "out")
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path, error):
    """A half-written folder gets loaded by somebody."""
    with pytest.raises(error), OutputFolder(tmp_path / "out", []) as folder:
        (folder.path / "model.safetensors").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path):
    """An early return must not publish, nor leave its temporary folder."""
    with OutputFolder(tmp_path / "out", []) as folder:
        assert folder.path.parent == tmp_path and folder.path.name.startswith(".out.qmerge-tmp-")
    assert os.listdir(tmp_path) == []


def test_nothing_is_made_by_checking(tmp_path):
    """A refused or planned run must not touch the disk."""
    OutputFolder(tmp_path / "deep" / "out", [])
    assert os.listdir(tmp_path) == []


def test_existing_output(tmp_path):
    """A finished merge must not be replaced without being asked."""
    make(tmp_path / "out")
    assert "--overwrite" in refusal(tmp_path / "out")


def test_overwrite_swaps_whole(tmp_path):
    """Old and new files must never mix: a stale shard beside a new index is a broken model."""
    make(tmp_path / "out", text="old")
    with OutputFolder(tmp_path / "out", [], overwrite=True) as folder:
        (folder.path / "other.safetensors").write_text("new")
        assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
        folder.commit(build_manifest(folder.path, inputs={}, recipe={}, versions={}))
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "other.safetensors"] and os.listdir(tmp_path) == ["out"]


def test_overwrite_that_fails_keeps_the_old(tmp_path):
    """The old result is deleted only after the new one is in its place."""
    make(tmp_path / "out", text="old")
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "out", [], overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_overwrite_whose_rename_fails_puts_the_old_back(tmp_path, monkeypatch):
    """Between the two renames the old folder is aside; an error there must not lose it."""
    make(tmp_path / "out", text="old")
    rename = os.rename

    def failing(source, target):
        if ".qmerge-tmp-" in str(source):
            raise OSError(5, "broken")
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", failing)
    with pytest.raises(Refused):
        make(tmp_path / "out", overwrite=True, text="new")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("content", [None, "{}", "[", '{"tool": {"name": "other"}, "files": {}}', '{"tool": {"name": "qmerge"}, "files": {}, "schema_version": 99}'])
def test_overwrite_refuses_what_is_not_ours(tmp_path, content):
    """--overwrite on a mistyped path must not delete somebody's folder."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    if content is not None:
        (out / "manifest.json").write_text(content)
    assert "not written by qmerge" in refusal(out, overwrite=True) and (out / "thesis.tex").exists()


def test_overwrite_refuses_to_lose_foreign_files(tmp_path):
    """Notes that people put into an output would vanish with it."""
    make(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert "notes.md" in refusal(tmp_path / "out", overwrite=True)


def test_overwrite_of_an_empty_folder(tmp_path):
    """`mkdir out` before the run is common and harms nobody."""
    (tmp_path / "out").mkdir()
    assert "exists" in refusal(tmp_path / "out")
    make(tmp_path / "out", overwrite=True)
    assert verify_files(tmp_path / "out") == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_is_a_link_or_a_file(tmp_path, overwrite):
    """Writing through a link changes a folder that nobody named; dangling links count too."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    assert "symbolic link" in refusal(tmp_path / "link", overwrite=overwrite)
    assert "symbolic link" in refusal(tmp_path / "dangling", overwrite=overwrite)
    assert "not a folder" in refusal(tmp_path / "file", overwrite=overwrite)
    assert "not a folder" in refusal(tmp_path / "file" / "out", overwrite=overwrite)


def test_output_and_inputs_must_not_contain_each_other(tmp_path):
    """Inputs are never written to, not even through links, and an overwrite must not swallow one."""
    base = tmp_path / "out" / "base"
    base.mkdir(parents=True)
    (tmp_path / "alias").symlink_to(base)
    assert "inside an input" in refusal(base / "new", [base])
    assert "inside an input" in refusal(base, [base], overwrite=True)
    assert "inside an input" in refusal(tmp_path / "alias" / "new", [base])
    assert "inside an input" in refusal(base / "new", [tmp_path / "alias"])
    assert "inside the output" in refusal(tmp_path / "out", [base], overwrite=True)
    check_output(tmp_path / "out-2", [base], False)


def test_output_in_a_hub_cache(tmp_path, monkeypatch):
    """Other tools rewrite and prune the cache; a result there gets lost or taken for a download."""
    assert "cache" in refusal(tmp_path / "models--org--x" / "snapshots" / "abc")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "cache" in refusal(tmp_path / "hub" / "out")


@pytest.mark.parametrize("name", ["", "..", "x" * 250])
def test_unusable_names(tmp_path, name):
    """A name that the temporary folder cannot have would fail after hours of work."""
    with pytest.raises(Refused):
        check_output(tmp_path / "new" / name if name else type(tmp_path)("."), [], False)


def test_two_runs_one_output(tmp_path):
    """One wins whole, the other says so; a mixture of both is the bug."""
    with OutputFolder(tmp_path / "out", []) as slow:
        (slow.path / "model.safetensors").write_text("slow")
        make(tmp_path / "out", text="fast")
        with pytest.raises(Refused, match="exists"):
            slow.commit({})
    assert (tmp_path / "out" / "model.safetensors").read_text() == "fast" and os.listdir(tmp_path) == ["out"]


def test_two_runs_that_race_at_the_rename(tmp_path, monkeypatch):
    """The other run may finish between the check and the rename."""
    with OutputFolder(tmp_path / "out", []) as slow:
        (slow.path / "model.safetensors").write_text("slow")
        make(tmp_path / "out", text="fast")
        monkeypatch.setattr(publish, "check_output", lambda *args: None)
        monkeypatch.setattr(publish.os.path, "lexists", lambda path: False)
        monkeypatch.setattr(type(tmp_path), "exists", lambda path: False)
        with pytest.raises(Refused, match="Another run"):
            slow.commit({})
        monkeypatch.undo()
    assert (tmp_path / "out" / "model.safetensors").read_text() == "fast" and os.listdir(tmp_path) == ["out"]


def test_order_of_syncs_and_renames(tmp_path, monkeypatch):
    """Data, then the manifest, then the folder, then the rename, then the parent; any other order can lose a power cut."""
    events = []
    fsync, rename = os.fsync, os.rename

    def path_of(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".qmerge")[0]

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(path_of(handle)), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda source, target: (events.append("rename"), rename(source, target)))
    make(tmp_path / "out")
    order = [events.index(name) for name in ("model.safetensors", "manifest.json", "rename")]
    assert order == sorted(order) and events[events.index("manifest.json") + 1 : events.index("rename")] == [".out"]
    assert events[events.index("rename") + 1 :] == [tmp_path.name]


def test_modes_follow_the_umask(tmp_path):
    """A folder that only its owner can enter cannot be served."""
    before = os.umask(0o027)
    try:
        make(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "manifest.json").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda out: (out / "model.safetensors").write_text("weightz"), "model.safetensors: changed"),
        (lambda out: (out / "sub" / "x.jinja").unlink(), "sub/x.jinja: missing"),
        (lambda out: (out / "extra.bin").write_text(""), "extra.bin: not in the manifest"),
        (lambda out: ((out / "model.safetensors").rename(out.parent / "m"), (out / "model.safetensors").symlink_to(out.parent / "m")), "not a regular file"),
        (lambda out: (out / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda out: (out / "manifest.json").write_text("{"), "valid JSON"),
    ],
)  # fmt: skip
def test_verify_names_what_changed(tmp_path, harm, says):
    """A check that compares sizes, or only listed files, misses these."""
    make(tmp_path / "out")
    harm(tmp_path / "out")
    assert any(says in problem for problem in verify_files(tmp_path / "out"))


def test_manifest_never_reads_outside(tmp_path):
    """A manifest from elsewhere may name any path; it must not be hashed, or its presence told."""
    make(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    manifest["files"]["../secret"] = {"sha256": "", "bytes": 0}
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert verify_files(tmp_path / "out") == ["This manifest is malformed: '../secret' is no name of a file inside the folder."]


def test_digest_refuses_links(tmp_path):
    """A link in the output is whole on this machine only."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(Refused):
        digest_files(tmp_path)


def test_manifest_names_inputs_without_the_machine(tmp_path):
    """User names and folders of the machine must not travel with a published model."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    save_file({"w": torch.ones(2, 2)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    key = "base_model.model.q.lora_%s.weight"
    save_file({key % "A": torch.ones(1, 2), key % "B": torch.ones(2, 1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    inputs = {"base": input_digests(open_checkpoint(base)), "adapter": input_digests(open_adapter(adapter))}
    manifest = build_manifest(base, inputs=inputs, recipe={"calibration": [base / "x.jsonl", str(tmp_path)]}, versions={"torch": "2"})
    assert str(tmp_path) not in json.dumps(manifest) and manifest["recipe"]["calibration"] == ["x.jsonl", tmp_path.name]
    assert manifest["schema_version"] == 1 and manifest["tool"] == {"name": "qmerge", "version": __version__}
    assert list(manifest["inputs"]["base"]["files"]) == ["config.json", "model.safetensors"]
    assert list(manifest["inputs"]["adapter"]["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert manifest["inputs"]["base"]["name"] == "base" and manifest["files"]["config.json"]["bytes"] == 2


def test_extra_fields_cannot_replace_the_facts(tmp_path):
    """A caller's field called "files" would turn off the digests."""
    (tmp_path / "a").write_text("x")
    manifest = build_manifest(tmp_path, inputs={}, recipe={}, versions={}, extra={"warnings": ["slow"], "files": {}})
    assert manifest["warnings"] == ["slow"] and list(manifest["files"]) == ["a"]


def test_portable_keeps_what_is_no_path():
    """Templates and ids with slashes must stay as they are."""
    assert portable({"a": ("org/name", "x/y.txt", "/ {{ x }}\n", 0.5, None, True)}) == {"a": ["org/name", "x/y.txt", "/ {{ x }}\n", 0.5, None, True]}
    assert portable("~/me/x.txt") == "x.txt"
