"""Opening model folders: single and sharded, complete and broken, and what a path or id resolves to."""

import json

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from qmerge.errors import Refused
from qmerge.store import hub
from qmerge.store.checkpoint import open_checkpoint

SHARDS = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}


def tensor(name):
    return torch.full((2, 3), float(ord(name)))


@pytest.fixture
def single(tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({name: tensor(name) for name in "abc"}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for file, names in SHARDS.items():
        save_file({name: tensor(name) for name in names}, folder / file)
    index(folder, {name: file for file, names in SHARDS.items() for name in names})
    return folder


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def refusal(folder, **options):
    with pytest.raises(Refused) as caught:
        open_checkpoint(folder, **options)
    assert caught.value.exit_code == 4
    return str(caught.value)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_opens_and_loads(kind, request):
    """A shard taken for another would hand out the wrong layer's weights."""
    folder = request.getfixturevalue(kind)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.name == kind and checkpoint.revision is None and set(checkpoint.specs) == set("abc")
    assert all(checkpoint.load(name).equal(tensor(name)) for name in "abc")
    assert checkpoint.weight_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert checkpoint.files() == sorted(folder.glob("*.safetensors"))


def test_unknown_tensor(single):
    """A KeyError would reach people as a traceback."""
    with pytest.raises(Refused, match="no such tensor"):
        open_checkpoint(single).load("z")


def test_missing_shard(sharded):
    """A missing shard found only while loading wastes an hour of work first."""
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "'c'" in (text := refusal(sharded)) and "model-00002-of-00002.safetensors" in text and "missing" in text


@pytest.mark.parametrize("file", ["../single/model.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\\b.safetensors", "x\0.safetensors", 3, None])
def test_index_that_leaves_the_folder(sharded, single, file):
    """transformers 5.23 follows '../victim/model.safetensors' out of the folder."""
    index(sharded, weight_map(sharded) | {"c": file})
    assert "plain file name" in refusal(sharded)


def test_index_that_names_a_pickle(sharded):
    """An index may not smuggle in a file of another format."""
    index(sharded, weight_map(sharded) | {"c": "pytorch_model.bin"})
    assert "not a safetensors file" in refusal(sharded)


def test_index_names_too_much(sharded):
    """A tensor that only the index knows would be missing from the output."""
    index(sharded, weight_map(sharded) | {"ghost": "model-00001-of-00002.safetensors"})
    assert "'ghost'" in refusal(sharded)


def test_index_names_too_little(sharded):
    """A tensor that only the shard knows would be dropped without a word."""
    index(sharded, {name: file for name, file in weight_map(sharded).items() if name != "b"})
    assert "'b'" in refusal(sharded)


def test_index_points_to_the_wrong_shard(sharded):
    """Index and headers must agree on the file, not only on the names."""
    index(sharded, weight_map(sharded) | {"c": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert "another shard" in refusal(sharded)


def test_tensor_in_two_shards(sharded):
    """Which of two copies counts depends on the loader."""
    save_file({"c": tensor("c"), "a": tensor("z")}, sharded / "model-00002-of-00002.safetensors")
    assert "two shards" in (text := refusal(sharded)) and "'a'" in text


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": []}', "{}", "[]", "", '{"weight_map": {"a": "x", "a": "y"}}'])
def test_broken_index(sharded, text):
    """An empty or malformed index must not open as a model without weights."""
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "index" in refusal(sharded)


def test_single_file_and_index(sharded):
    """Loaders disagree on which of the two counts."""
    save_file({"a": tensor("a")}, sharded / "model.safetensors")
    assert "both" in refusal(sharded)


@pytest.mark.parametrize("text", [None, "[]", "{", '{"a": 1, "a": 2}', "\xff"])
def test_missing_or_broken_config(single, text):
    """Without a config nothing says how the weights are quantized."""
    (single / "config.json").unlink()
    if text is not None:
        (single / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(single)


def test_pickle_only(single):
    """Pickle weights can run code; people need to hear how to convert them."""
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    assert "pickle" in (text := refusal(single)) and "save_pretrained" in text


def test_no_weights_at_all(single):
    """A folder with a config only is not a model."""
    (single / "model.safetensors").unlink()
    assert "no safetensors weights" in refusal(single)
    save_file({}, single / "model.safetensors")
    assert "no tensors" in refusal(single)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/no-such-folder-of-qmerge", "a/b/c", "../x", "a\\b"])
def test_missing_local_folder_never_asks_the_hub(path, monkeypatch):
    """A typo in a path must not be sent to a server as a model id."""
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **more: pytest.fail("asked the hub"))
    assert "no such folder" in refusal(path)


def test_a_file_instead_of_a_folder(single):
    """People pass the weight file; the message has to name the folder."""
    assert "not a file" in refusal(str(single / "model.safetensors"))


@pytest.mark.parametrize("text", ["", "a b/c", "org/", "-x/y", "org/na:me"])
def test_neither_path_nor_id(text, monkeypatch):
    """Malformed ids must be refused before the network sees them."""
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **more: pytest.fail("asked the hub"))
    assert refusal(text)


def snapshot(tmp_path, single):
    folder = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for path in single.iterdir():
        path.rename(blobs / path.name)
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    return folder


def test_hub_id_gives_name_and_commit(tmp_path, single, monkeypatch):
    """A manifest that says "main" cannot be reproduced; it needs the commit."""
    folder = snapshot(tmp_path, single)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, revision, **more: str(folder))
    checkpoint = open_checkpoint("org/tiny", revision="main")
    assert (checkpoint.name, checkpoint.revision) == ("org/tiny", folder.name) and checkpoint.load("a").equal(tensor("a"))


def test_folder_of_the_hub_cache_keeps_its_identity(tmp_path, single):
    """Passing the cache folder itself must not name the model by a bare hash."""
    folder = snapshot(tmp_path, single)
    assert hub.resolve(folder)[1:] == ("org/tiny", folder.name)


def test_revision_of_a_local_folder(single):
    """A revision that is silently ignored merges the wrong weights."""
    assert "revision" in refusal(single, revision="v2")


def test_no_network_falls_back_to_the_cache(tmp_path, single, monkeypatch):
    """Offline machines have the model already."""
    folder = snapshot(tmp_path, single)

    def download(repo, revision, local_files_only=False, **more):
        if not local_files_only:
            raise ConnectionError("https://user:hf_secret@host")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_checkpoint("org/tiny").revision == folder.name


def test_no_network_and_no_cache(monkeypatch):
    """The message must not repeat the address, which can hold a token, and no cause may print it either."""

    def download(repo, revision, **more):
        raise ConnectionError("https://user:hf_secret@host")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(Refused) as caught:
        hub.resolve("org/tiny")
    assert "cannot be reached" in str(caught.value) and "hf_secret" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(("error", "says"), [("RepositoryNotFoundError", "no such model"), ("RevisionNotFoundError", "no such revision"), ("GatedRepoError", "granted")])
def test_what_the_hub_refuses(error, says, monkeypatch):
    """An unknown model must not be taken for a missing network, or an old cache would be used in its place."""

    class Gone(getattr(hub_errors, error)):
        def __init__(self):
            Exception.__init__(self, "hf_secret")

    def download(repo, revision, local_files_only=False, **more):
        assert not local_files_only
        raise Gone

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(Refused, match=says) as caught:
        hub.resolve("org/tiny", "main")
    assert "hf_secret" not in str(caught.value)


def test_pickle_and_code_are_never_downloaded():
    """A broad pattern would fetch (and leave on disk) code and pickles."""
    from fnmatch import fnmatch

    for name in ("pytorch_model.bin", "modeling_x.py", "model.pt", "LICENSE.py"):
        wanted = any(fnmatch(name, pattern) for pattern in hub.ALLOW_PATTERNS)
        assert not wanted or any(fnmatch(name, pattern) for pattern in hub.IGNORE_PATTERNS), name
