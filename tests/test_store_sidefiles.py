"""A server finds tokenizer, templates, configs and licences beside the weights, and never code."""

import os
import stat

import pytest

from qmerge.errors import Refused
from qmerge.store.sidefiles import copy_side_files


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in ("base", "adapter", "out")]
    for folder in made:
        folder.mkdir()
    return made


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{folder.name}:{name}")


def test_everything_a_server_needs(folders):
    """A missing file of these means a wrong prompt, or none."""
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja", "generation_config.json",
             "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md"]  # fmt: skip
    fill(folders[0], *names)
    assert copy_side_files(*folders) == sorted(names)
    assert all((folders[2] / name).read_text() == f"base:{name}" for name in names)


def test_nothing_else(folders):
    """Code, weights, configs and other people's notes do not belong in the output."""
    fill(folders[0], "tokenizer.json", "modeling_x.py", "tokenization_x.py", "LICENSE.py", "tokenizer.py", "config.json", "model.safetensors", "README.md",
         "training_args.bin", "sub/tokenizer.json", "optimizer.pt", "NOTICE.sh", ".env")  # fmt: skip
    assert copy_side_files(*folders) == ["tokenizer.json"] and os.listdir(folders[2]) == ["tokenizer.json"]


def test_tokenizer_of_the_adapter_comes_whole(folders):
    """The base's chat template with the adapter's added tokens is a tokenizer that nobody trained with."""
    fill(folders[0], "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "generation_config.json")
    fill(folders[1], "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    assert copy_side_files(*folders) == ["added_tokens.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (folders[2] / "tokenizer_config.json").read_text().startswith("adapter:")
    assert (folders[2] / "generation_config.json").read_text().startswith("base:")


def test_adapter_without_a_vocabulary_has_no_tokenizer(folders):
    """A tokenizer_config.json alone cannot tokenize; mixing it into the base's set is the same bug."""
    fill(folders[0], "tokenizer.json", "tokenizer_config.json")
    fill(folders[1], "tokenizer_config.json", "special_tokens_map.json")
    assert copy_side_files(*folders) == ["tokenizer.json", "tokenizer_config.json"]
    assert (folders[2] / "tokenizer_config.json").read_text().startswith("base:")


def test_generation_config_of_the_adapter_wins(folders):
    """A fine-tune that changed its stop tokens says so there."""
    fill(folders[0], "generation_config.json")
    fill(folders[1], "generation_config.json")
    copy_side_files(*folders)
    assert (folders[2] / "generation_config.json").read_text().startswith("adapter:")


def test_both_licences_are_kept(folders):
    """A merge is under both licences; the adapter's must not replace the base's."""
    fill(folders[0], "LICENSE")
    fill(folders[1], "LICENSE", "NOTICE")
    assert copy_side_files(*folders) == ["LICENSE", "LICENSE.adapter", "NOTICE"]
    assert (folders[2] / "LICENSE").read_text().startswith("base:") and (folders[2] / "LICENSE.adapter").read_text().startswith("adapter:")


def test_links_of_a_hub_snapshot_become_files(tmp_path, folders):
    """A copied link points nowhere on the next machine; a copied 0600 cannot be served."""
    repo = tmp_path / "models--org--x"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "123").write_text("{}")
    (repo / "blobs" / "123").chmod(0o600)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    before = os.umask(0o022)
    try:
        copy_side_files(snapshot, folders[1], folders[2])
    finally:
        os.umask(before)
    copied = folders[2] / "tokenizer.json"
    assert not copied.is_symlink() and copied.read_text() == "{}" and stat.S_IMODE(copied.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["LICENSE", "additional_chat_templates/x.jinja"])
def test_link_that_leaves_its_folder(tmp_path, folders, name):
    """A downloaded folder with LICENSE -> ~/.ssh/id_rsa would publish the key."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jinja").write_text("key")
    if "/" in name:
        (folders[0] / "additional_chat_templates").symlink_to(tmp_path / "secret")
    else:
        (folders[0] / name).symlink_to(tmp_path / "secret" / "x.jinja")
    fill(folders[1], "tokenizer_config.json")
    with pytest.raises(Refused, match="leads out") as caught:
        copy_side_files(*folders)
    assert name in str(caught.value) and os.listdir(folders[2]) == []


def test_empty_folders(folders):
    """An input without side files is no error."""
    assert copy_side_files(*folders) == []
