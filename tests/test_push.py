"""`qmerge push` through the hub's real client, against a stand-in of its HTTP API on this machine: what arrives, what is refused, what is said when it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub import TOKEN, Hub

from qmerge.store.manifest import read_manifest

HERE = Path(__file__).parent


def commands(hub: Hub, folder: Path, *words: list[object], token: str | None = TOKEN, xet: bool = False, **more: str) -> list[tuple[int, str, str]]:
    """Each of ``words`` as one ``qmerge`` command, all in one child process that knows the stand-in's address; ``(exit code, stdout, stderr)`` of each. ``xet``: large files go by hf_xet, as they
    do where it is installed; else as clients without it send them."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "0" if xet else "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": f"{HERE.parent}{os.pathsep}{env.get('PYTHONPATH', '')}"} | more
    env |= {"HF_TOKEN": token} if token else {}
    asked = json.dumps([[str(word) for word in line] for line in words])
    done = subprocess.run([sys.executable, HERE / "support" / "push_child.py", asked], env=env, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def hub():
    with Hub() as made:
        yield made


@pytest.fixture(scope="module")
def out(written, tmp_path_factory) -> Path:
    """A checkpoint of several shards; evidence, a journal and a note lie beside it, as after a run."""
    place = tmp_path_factory.mktemp("push")
    made = Path(shutil.copytree(written("llama", "bf16", "--shard-size", "0.2MB")[0], place / "tuned"))
    (place / "tuned.eval").mkdir()
    (place / "tuned.eval" / "results.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def told(hub, out, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """What each push said, by repository."""
    folder = tmp_path_factory.mktemp("child")
    spoilt = Path(shutil.copytree(out, folder / "spoilt"))
    (spoilt / "generation_config.json").write_text("{}")
    noted = Path(shutil.copytree(out, folder / "noted"))
    (noted / "notes.txt").write_text("not for everybody")
    carded = Path(shutil.copytree(out, folder / "carded"))
    for name, private, files in (("empty", True, {}), ("used", True, {"theirs.bin": b"x"}), ("replaced", True, {"theirs.bin": b"x", "config.json": b"{}"}), ("seen", False, {})):
        hub.create(f"standin/{name}", private, files)
    push = ["push", out, "--yes", "--repo"]
    lines = {
        "dry": ["push", out, "--repo", "standin/dry"],
        "new": [*push, "standin/new"],
        "new again": [*push, "standin/new"],
        "public": [*push, "standin/public", "--public"],
        "empty": [*push, "standin/empty"],
        "used": [*push, "standin/used"],
        "replaced": [*push, "standin/replaced", "--replace"],
        "seen": [*push, "standin/seen"],
        "spoilt": ["push", spoilt, "--yes", "--repo", "standin/spoilt"],
        "noted": ["push", noted, "--yes", "--repo", "standin/noted"],
        "no id": [*push, "standin"],
        "lies-config": [*push, "standin/lies-config"],
        "lies-private": [*push, "standin/lies-private"],
        "moves-meanwhile": [*push, "standin/moves-meanwhile"],
        "breaks-commit": [*push, "standin/breaks-commit"],
        "breaks-info": [*push, "standin/breaks-info"],
        **{name: [*push, f"standin/{name}"] for name in ("fails-create-403", "fails-create-409", "fails-create-500", "fails-info-500", "fails-preupload-403", "fails-batch-403", "fails-put-403", "fails-commit-500", "fails-commit-401", "fails-listing-403")},
        "card": ["card", carded, "--base-id", "standin/base", "--adapter-id", "standin/adapter", "--id", "standin/carded"],
        "carded": ["push", carded, "--yes", "--repo", "standin/carded", "--json"],
    }
    return dict(zip(lines, commands(hub, folder, *lines.values()), strict=True))


def held(hub: Hub, repo: str) -> dict[str, bytes]:
    return {name: hub.content(repo, name) for name in hub.repositories[repo].at("main")[1] if name != ".gitattributes"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("repo", ["new", "public", "empty", "replaced"])
def test_the_repository_holds_the_folder_and_nothing_else(told, hub, out, repo):
    """A file that arrives changed, twice, not at all, or that was never meant to go: another's file that stays among ours."""
    assert told[repo][0] == 0, told[repo][2]
    assert held(hub, f"standin/{repo}") == files_of(out)
    assert hub.repositories[f"standin/{repo}"].head in told[repo][1]


def test_it_is_private_unless_asked_otherwise(told, hub):
    """A customer's model that everybody can download for an hour."""
    assert hub.repositories["standin/new"].private and not hub.repositories["standin/public"].private
    assert "private" in told["new"][1] and "public" in told["public"][1]


def test_without_yes_nothing_is_asked_of_the_hub(told, hub, out):
    """A dry run that creates the repository, or that lists other files than are sent."""
    code, said, _ = told["dry"]
    assert code == 0 and not any("standin/dry" in line or '"dry"' in line for line in hub.asked) and "standin/dry" not in hub.repositories
    assert all(name in said for name in files_of(out)) and "private" in said and "--yes" in told["dry"][2] and "qmerge card" in told["dry"][2]


@pytest.mark.parametrize(("repo", "says"), [("new again", "not empty"), ("used", "not empty"), ("seen", "is public")])
def test_a_repository_of_somebody_is_left_alone(told, hub, repo, says):
    """Files of a team that a push deletes or mixes with its own; a checkpoint put where everybody looks."""
    code, _, error = told[repo]
    assert code == 4 and says in error
    assert repo == "new again" or len(hub.repositories[f"standin/{repo}"].commits) == 1


@pytest.mark.parametrize("repo", ["spoilt", "noted"])
def test_what_does_not_verify_is_not_pushed(told, hub, repo):
    """A changed file published under the manifest of the good one; a private note that goes along."""
    code, _, error = told[repo]
    assert code == 1 and "FAILED files" in error and f"standin/{repo}" not in hub.repositories


@pytest.mark.parametrize(
    ("repo", "code", "says", "left"),
    [
        ("fails-create-403", 4, "does not let this token", "nothing"), ("fails-create-409", 4, "somebody else", "nothing"), ("fails-create-500", 75, "failed", "nothing"), ("fails-info-500", 75, "failed", "nothing"),
        ("fails-preupload-403", 4, "does not let", "still empty"), ("fails-batch-403", 4, "does not let", "still empty"), ("fails-put-403", 4, "does not let", "still empty"),
        ("fails-commit-500", 75, "failed", "still empty"), ("fails-commit-401", 4, "does not let", "still empty"), ("moves-meanwhile", 4, "somebody else", "still empty"),
        ("fails-listing-403", 4, "does not let", "could not be compared"), ("breaks-info", 75, "connection broke", "nothing"), ("breaks-commit", 75, "connection broke", "the answer was lost"),
        ("lies-private", 4, "is public", "still empty"), ("lies-config", 1, "config.json: other bytes", "commit "),
    ],
)  # fmt: skip
def test_a_failure_says_what_happened_and_what_is_there(told, hub, repo, code, says, left):
    """A traceback, an exit code 0, a claim of success, or silence about what the hub holds now."""
    found, said, error = told[repo]
    assert found == code and says in error and left in next(line for line in error.splitlines() if "written:" in line), error
    assert not said and "Traceback" not in error and "\x1b[31mtoday" not in error
    there = hub.repositories.get(f"standin/{repo}")
    assert there is None or len(there.commits) == (2 if code == 1 or "listing" in repo or "meanwhile" in repo else 1)


def test_the_token_is_in_no_message(told, hub):
    """A token in a CI log is a token for everybody."""
    assert not any(TOKEN in part or TOKEN[3:] in part for _, *parts in told.values() for part in parts)
    assert not any(TOKEN.encode() in body for body in hub.objects.values()) and not any(TOKEN in message for row in hub.repositories.values() for message in row.messages)


def test_a_card_goes_along(told, hub):
    """A model without its card, which the hub asks for; or `--json` that is none."""
    assert told["card"][0] == 0 and told["carded"][0] == 0, told["carded"][2]
    row = json.loads(told["carded"][1])
    assert row["revision"] == hub.repositories["standin/carded"].head and row["private"] is True and b"standin/base" in held(hub, "standin/carded")["README.md"]


def test_not_logged_in(hub, out, tmp_path):
    """A first-time user without a token: told how to log in, and the hub is not asked."""
    before = len(hub.asked)
    ((code, _, error), ) = commands(hub, tmp_path, ["push", out, "--yes", "--repo", "standin/nobody"], token=None)
    assert code == 4 and "hf auth login" in error and len(hub.asked) == before


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "says"), [("fails-put-500", "failed"), ("breaks-put", "connection broke"), ("fails-batch-503", "failed")])
def test_a_line_that_breaks_in_the_middle_of_a_large_file(hub, out, tmp_path, repo, says):
    """After the client's own retries (half a minute): a commit without its weights, or a claim that it is there."""
    ((code, said, error), ) = commands(hub, tmp_path, ["push", out, "--yes", "--repo", f"standin/{repo}"])
    assert code == 75 and says in error and "still empty" in error and not said and len(hub.repositories[f"standin/{repo}"].commits) == 1


def test_a_download_verifies(told, hub, out, tmp_path):
    """What the hub and its client add to a folder (.gitattributes, .cache) taken for tampering, or files that came back changed."""
    script = "import sys; from huggingface_hub import snapshot_download; snapshot_download('standin/new', local_dir=sys.argv[1])"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    subprocess.run([sys.executable, "-c", script, tmp_path / "back"], env=env, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "back" / ".gitattributes").is_file() and (tmp_path / "back" / ".cache").is_dir()
    from qmerge.pipeline.verify import verify

    assert all(check.passed for check in verify(str(tmp_path / "back")))
    assert read_manifest(tmp_path / "back") == read_manifest(out)


@pytest.fixture(scope="module")
def by_xet(hub, out, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """What each push said whose large files went by hf_xet."""
    pytest.importorskip("hf_xet")
    names = ["xet", "xet-public", "fails-token-403", "fails-xorb-403", "fails-shard-401"]
    lines = [["push", out, "--yes", "--repo", f"standin/{name}", *(["--public"] if name.endswith("public") else [])] for name in names]
    return dict(zip(names, commands(hub, tmp_path_factory.mktemp("xet"), *lines, xet=True), strict=True))


@pytest.mark.parametrize("repo", ["xet", "xet-public"])
def test_large_files_that_go_by_xet_arrive(by_xet, hub, out, repo):
    """The way that a usual installation takes, chunks instead of files, which no other test here takes: bytes lost on it, or a repository that everybody sees."""
    assert by_xet[repo][0] == 0, by_xet[repo][2]
    assert any(f"/cas/standin/{repo}/v1/shards" in line for line in hub.asked) and not any(f"/standin/{repo}.git/info/lfs" in line for line in hub.asked)
    assert held(hub, f"standin/{repo}") == files_of(out) and hub.repositories[f"standin/{repo}"].private == (repo == "xet")


@pytest.mark.parametrize(("repo", "found"), [("fails-token-403", "403"), ("fails-xorb-403", "403"), ("fails-shard-401", "401")])
def test_a_refusal_on_the_way_by_xet_is_said_as_one(by_xet, hub, repo, found):
    """hf_xet reports a refusal as a network error: "run the same command again", for ever."""
    code, said, error = by_xet[repo]
    assert code == 4 and f"found:      {found}" in error and "does not let this token" in error and "still empty" in error and not said
    assert "Traceback" not in error and TOKEN not in error and len(hub.repositories[f"standin/{repo}"].commits) == 1
