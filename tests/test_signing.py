"""docs/signing.md: each of its commands for real, and what `qmerge verify` says of a signed folder. Skipped where model-signing is not installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tamper import renew

DOC = Path(__file__).parents[1] / "docs" / "signing.md"
pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'qmerge[sign]'")
if shutil.which("openssl") is None:
    pytest.skip("there is no openssl to make a key with", allow_module_level=True)


@pytest.fixture(scope="module")
def signed(written, tmp_path_factory) -> Path:
    """A folder with ``out/tuned``, ``out/tuned.sig``, ``key.pem`` and ``key.pub``, made by the commands of the doc, which all have to succeed."""
    place = tmp_path_factory.mktemp("signing")
    shutil.copytree(written("llama", "bf16")[0], place / "out" / "tuned")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", DOC.read_text(), re.S) for line in block.splitlines()]
    local = [line for line in lines if line.startswith(("openssl", "model_signing sign key", "model_signing verify key", "qmerge verify out/tuned"))]
    assert len(local) == 6, "the doc has other commands now"
    shims = {"qmerge": "from qmerge.cli.main import main", "model_signing": "from model_signing._cli import main"}
    for name, line in shims.items():
        shim = place / "bin" / name
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(f"#!{sys.executable}\n{line}\nmain()\n")
        shim.chmod(0o755)
    env = os.environ | {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{DOC.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    for line in local:
        done = subprocess.run(line, shell=True, cwd=place, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{line}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
    return place


@pytest.fixture
def copy(signed, tmp_path) -> Path:
    return Path(shutil.copytree(signed / "out", tmp_path / "out"))


@pytest.fixture
def verify(cli, signed):
    def run(folder: Path, signature: Path | None = None, key: Path | None = None):
        answer = cli("verify", folder / "tuned", "--signature", signature or folder / "tuned.sig", "--public-key", key or signed / "key.pub")
        return answer.code, {line.split()[1].rstrip(":") for line in answer.out.splitlines() if line.startswith("FAILED")}, answer

    return run


def flip(file: Path) -> None:
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)


def test_a_signed_folder_verifies(copy, verify):
    """A signature that is never asked for, or one that fails in the folder it was made of."""
    code, failed, answer = verify(copy)
    assert code == 0 and not failed and "ok     signature" in answer.out


def test_one_byte_fails_files_and_signature(copy, verify):
    """The doc's table, row by row from here."""
    flip(copy / "tuned" / "tokenizer.json")
    code, failed, _ = verify(copy)
    assert code == 1 and {"files", "signature"} <= failed


def test_renewed_hashes_do_not_help(copy, verify):
    """A manifest that was made to fit: the one thing that no hash inside the folder can tell."""
    (copy / "tuned" / "chat_template.jinja").write_text("{{ 'be evil' }}")
    renew(copy / "tuned")
    assert verify(copy)[:2] == (1, {"signature"})


def test_a_file_more_and_a_file_less(copy, verify, tmp_path):
    """A signature that vouches for what is left, or for what came later."""
    (copy / "tuned" / "extra.bin").write_bytes(b"x")
    assert verify(copy)[:2] == (1, {"files"})
    (copy / "tuned" / "extra.bin").unlink()
    (copy / "tuned" / "generation_config.json").unlink()
    code, failed, _ = verify(copy)
    assert code == 1 and {"files", "signature"} <= failed


def test_another_key(copy, verify, tmp_path):
    """Any signature taken for the one that was asked for."""
    subprocess.run("openssl ecparam -name prime256v1 -genkey -noout -out other.pem && openssl ec -in other.pem -pubout -out other.pub", shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert verify(copy, key=tmp_path / "other.pub")[:2] == (1, {"signature"})


def test_a_signature_that_leaves_a_file_out(copy, signed, verify, tmp_path):
    """Signed with the weights ignored: model-transparency is content, and the weights can be anything."""
    import model_signing

    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=signed / "key.pem")
    config.set_hashing_config(model_signing.hashing.Config().set_ignored_paths(paths=[copy / "tuned" / "model.safetensors"])).sign(copy / "tuned", tmp_path / "part.sig")
    code, failed, answer = verify(copy, tmp_path / "part.sig")
    assert (code, failed) == (1, {"signature"}) and "does not cover model.safetensors" in answer.out


def test_inside_the_folder_as_model_sig(copy, verify):
    """A published folder, whose signature the `files` check would call foreign."""
    (copy / "tuned.sig").rename(copy / "tuned" / "model.sig")
    assert verify(copy, copy / "tuned" / "model.sig")[:2] == (0, set())


@pytest.mark.parametrize("harm", ["no such file", "no signature", "a pipe"])
def test_a_signature_that_is_none(copy, verify, tmp_path, harm):
    """A traceback of the library, or a wait for the other end of a pipe."""
    bad = tmp_path / "bad.sig"
    if harm == "no signature":
        bad.write_text('{"dsseEnvelope": 5}')
    elif harm == "a pipe":
        os.mkfifo(bad)
    code, _, answer = verify(copy, bad)
    assert code == (1 if harm == "no signature" else 4) and "Traceback" not in answer.err
