"""Folders that somebody else is at: an output that is replaced while it is looked at, a run's folder that another user has put there, a manifest with a lost bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.tamper import renew

from qmerge.pipeline import verify as verifying
from qmerge.store import renew as renewing
from qmerge.store.journal import Journal
from qmerge.store.manifest import seal_fault, verify_files


@pytest.fixture
def words(zoo, tmp_path):
    (tmp_path / "place").mkdir()
    return ("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--device", "cpu", "--out", tmp_path / "place" / "out", "--format")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


def test_a_card_does_not_undo_a_merge(cli, words, place, monkeypatch):
    """`qmerge card` builds the folder anew and swaps it in: a merge that ended in between was thrown away, and the old weights came back."""
    assert cli(*words, "bf16").code == 0
    inner, done = renewing.digest_file, []

    def digest_file(path: Path):
        if path.name == "README.md" and not done:
            done.append(cli(*words, "fp16", "--overwrite").code)
        return inner(path)

    monkeypatch.setattr(renewing, "digest_file", digest_file)
    answer = cli("card", place / "out")
    assert done == [0] and answer.code == 4 and "replaced by another run" in answer.err, answer.err
    assert verify_files(place / "out") == [] and os.listdir(place) == ["out"]
    assert json.loads((place / "out" / "manifest.json").read_text())["recipe"]["format"] == "fp16"


def test_a_folder_that_is_replaced_while_it_is_verified(cli, words, place, monkeypatch):
    """A good checkpoint that is called broken (do not serve this), because half of the hashes were those of the one before."""
    assert cli(*words, "bf16").code == 0
    inner = verifying.verify_files

    def verify_files(folder: Path):
        assert cli(*words, "fp16", "--overwrite").code == 0
        return inner(folder)

    monkeypatch.setattr(verifying, "verify_files", verify_files)
    answer = cli("verify", place / "out")
    assert answer.code == 75 and "replaced while it was being verified" in answer.err and "do not serve" not in answer.err


def left_by_a_run(cli, words, place: Path, zoo, monkeypatch) -> tuple:
    """An interrupted run beside OUT, and the command that would go on with it."""
    from qmerge.pipeline import streams

    command = (*words, "gptq", "--group-size", 32, "--calibration", zoo.calibration, "--samples", 8, "--tokens", 64, "--curvature-tokens", 0)
    inner, calls = streams.requantize_group, []

    def requantize_group(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return inner(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(streams, "requantize_group", requantize_group)
        assert cli(*command).code == 75
    (home,) = place.glob(".out.qmerge-run-*")
    return home, (*command, "--resume")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_run_that_another_user_has_put_there(cli, words, place, zoo, monkeypatch):
    """In /tmp anybody can make `.OUT.qmerge-run-…` with digests that fit: its weights would be published as ours by the next --resume."""
    home, command = left_by_a_run(cli, words, place, zoo, monkeypatch)
    for path in (home, *home.rglob("*")):
        os.chown(path, 12345, 12345)
    answer = cli(*command)
    assert answer.code == 0 and "made by another user" in answer.err and "starting from the beginning" in answer.err, answer.err
    assert home.exists()


@pytest.mark.parametrize("facts", [{}, {"fixed": [], "free": {}}, {"fixed": {"recipe": 1}, "free": {}}, [1], "x", None])
def test_a_journal_of_the_wrong_kind(cli, words, place, zoo, monkeypatch, facts):
    """A traceback on a record whose digest fits and whose fields do not."""
    home, command = left_by_a_run(cli, words, place, zoo, monkeypatch)
    Journal(home / "journal").put("run", facts)
    answer = cli(*command)
    assert answer.code in (0, 4) and "Traceback" not in answer.err, answer.err


def test_every_byte_of_a_manifest(cli, words, place, tmp_path):
    """A record of the recipe or of an input that a disk has changed, in a folder that verifies."""
    assert cli(*words, "bf16").code == 0
    out = shutil.copytree(place / "out", tmp_path / "copy")
    whole = (out / "manifest.json").read_bytes()
    assert seal_fault(out) is None
    for index in range(0, len(whole), 5):
        (out / "manifest.json").write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert verify_files(out) or seal_fault(out), (index, whole[max(0, index - 20) : index + 20])


def test_a_damaged_manifest_is_not_sealed_anew(cli, words, place):
    """`qmerge card` writes the manifest again: what a lost bit has changed in it would have a good digest from then on."""
    assert cli(*words, "bf16").code == 0
    file = place / "out" / "manifest.json"
    file.write_text(file.read_text().replace('"format": "bf16"', '"format": "fp16"'))
    answer = cli("verify", place / "out")
    assert answer.code == 1 and "manifest: " in answer.err
    assert cli("card", place / "out").code == 4
    renew(place / "out")
    assert cli("verify", place / "out").code == 0 and cli("card", place / "out").code == 0 and cli("verify", place / "out").code == 0


@pytest.mark.parametrize("command", ["verify", "card"])
def test_an_output_that_a_killed_swap_has_put_aside(cli, words, place, command):
    """Killed between its two renames, a swap leaves no OUT: "no such folder", and nothing about the hidden one beside it that is the old one."""
    assert cli(*words, "bf16").code == 0
    (place / "out").rename(place / ".out.qmerge-old-0123abcd")
    answer = cli(command, place / "out")
    assert answer.code == 4 and ".out.qmerge-old-0123abcd" in answer.err and "rename it to out" in answer.err
