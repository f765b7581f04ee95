"""Text becomes documents, tokens and windows without anything lost, doubled or guessed."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qmerge.errors import Refused, UsageProblem
from qmerge.store.overlap import ngram_overlap
from qmerge.store.texts import Document, read_documents
from qmerge.store.windows import TokenDoc, pack_windows, text_fingerprint, tokenize_documents

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", chat: str | None = None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [t for t in dict.fromkeys((bos, eos)) if t]
    raw.train_from_iterator(["the cat sat on the mat", "a dog ran 3 + 4 = 7"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos)
    made.chat_template = chat
    return made


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_txt_is_one_document_or_split(tmp_path):
    """A separator that is ignored (or applied unasked) would change every perplexity."""
    file = tmp_path / "a.txt"
    file.write_text("one\n\n---\ntwo\n")
    assert [d.text for d in read_documents(file)] == ["one\n\n---\ntwo\n"]
    assert [d.text for d in read_documents(file, doc_separator="---")] == ["one", "two"]


def test_crlf_reads_as_lf(tmp_path):
    """The same text saved on Windows must give the same tokens."""
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    assert read_documents(tmp_path / "a.txt")[0].text == "one\ntwo"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_rows_of_each_file_kind(tmp_path, suffix):
    """One reader per file kind, the same documents from each."""
    rows, file = [{"text": "one"}, {"text": "two"}], tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)) + "\n")
    assert [d.text for d in read_documents(file)] == ["one", "two"]


def test_folder_reads_all_files_in_order(tmp_path):
    """Directory order is not defined; a fingerprint that depends on it would differ between machines."""
    (tmp_path / "b.txt").write_text("second")
    write(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "notes.md").write_text("not text data")
    assert [d.text for d in read_documents(tmp_path)] == ["first", "second"]


def test_prompt_is_not_scored(tmp_path, tokenizer):
    """Scoring prompts would dilute what the fine-tune learned; the token that straddles the border counts as completion."""
    docs = read_documents(write(tmp_path / "a.jsonl", [{"prompt": "3 + 4 =", "completion": " 7"}]))
    item = tokenize_documents(docs, tokenizer)[0]
    assert tokenizer.decode(item.ids[item.scored]) == " 7</s>"
    assert not item.scored[0]


def test_messages_need_a_template(tmp_path, tokenizer):
    """Falling back to joined strings would measure a format that the model never saw."""
    file = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "the cat"}]}])
    with pytest.raises(Refused, match="chat template"):
        read_documents(file, tokenizer=tokenizer)
    assert read_documents(file, tokenizer=make_tokenizer(chat=CHAT))[0].text == "<s><user>the cat</s>\n"


def test_template_fields_and_its_limits(tmp_path):
    """A template is filled, never evaluated: attribute access in it would be a way into the process."""
    file = write(tmp_path / "a.jsonl", [{"q": "3 + 4", "n": 7}])
    assert read_documents(file, "Q: {q} {{=}} {n}")[0].text == "Q: 3 + 4 {=} 7"
    for bad in ("{q.__class__}", "{q[0]}", "{q!r}", "{}", "{q", "no field"):
        with pytest.raises(UsageProblem):
            read_documents(file, bad)
    with pytest.raises(Refused, match="`x` of a row is missing"):
        read_documents(file, "{x}")


@pytest.mark.parametrize(("name", "content", "says"), [
    ("empty.txt", " \n", "empty"),
    ("empty.jsonl", "", "empty"),
    ("list.json", "{}", "list of rows"),
    ("norows.json", "[]", "no documents"),
    ("bad.jsonl", '{"text": "a"}\n{"text": ', "bad.jsonl, line 2"),
    ("row.jsonl", "[1]", "not an object"),
    ("field.jsonl", '{"body": "a"}', "fields: body"),
    ("type.jsonl", '{"text": 3}', "not text"),
    ("kind.csv", "a,b", "kind of this file"),
    ("bin.parquet", "PAR", "Parquet"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, says):
    """A file that is skipped or half read would silently change the evidence."""
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused) as error:
        read_documents(tmp_path / name)
    assert says in str(error.value) and name in str(error.value)


def test_missing_file_never_asks_the_hub(tmp_path):
    """A typing error in a path must not become a download."""
    with pytest.raises(Refused, match="no such file"):
        read_documents(tmp_path / "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no text files"):
        read_documents(tmp_path / "empty")


def test_not_utf8_is_refused(tmp_path):
    """Guessing an encoding gives other tokens."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Refused, match="UTF-8"):
        read_documents(tmp_path / "a.txt")


def test_bos_and_eos_once(tokenizer):
    """A doubled BOS shifts every number; so does one that the chat template brought and we add again."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("the cat", "<s>the cat", "<s>the cat</s>", "the cat</s>\n"):
        ids = tokenize_documents([Document(text)], tokenizer)[0].ids.tolist()
        assert (ids[0], ids.count(bos), ids.count(eos)) == (bos, 1, 1), text
    plain = make_tokenizer(bos=None, eos=None)
    assert tokenize_documents([Document("the cat")], plain)[0].ids.tolist() == plain("the cat")["input_ids"]


def test_shared_bos_eos_is_not_packed_twice():
    """GPT-2 has one token for both; two in a row at each border is something it never saw."""
    one = make_tokenizer(bos="<|end|>", eos="<|end|>")
    docs = tokenize_documents([Document("the cat"), Document("a dog")], one)
    ids = torch.cat(pack_windows(docs, 64, keep_tail=True).ids)
    assert int((ids == one.eos_token_id).sum()) == 3


def test_windows_keep_every_token_in_order():
    """A lost or repeated token at a window's edge would go unnoticed in a mean."""
    docs = [TokenDoc(torch.arange(i * 100, i * 100 + n), torch.ones(n, dtype=torch.bool)) for i, n in enumerate((5, 9, 3))]
    full = pack_windows(docs, 4, keep_tail=False)
    assert [len(w) for w in full.ids] == [4, 4, 4, 4] and full.dropped_tokens == 1
    assert torch.equal(torch.cat(full.ids), torch.cat([d.ids for d in docs])[:16])
    assert torch.cat(full.doc).tolist() == [0] * 5 + [1] * 9 + [2] * 2
    assert [len(w) for w in pack_windows(docs, 5, keep_tail=True).ids] == [5, 5, 5, 2]
    assert len(pack_windows(docs, 100).ids[0]) == 17  # the only window is kept
    with pytest.raises(Refused, match="too short"):
        pack_windows([TokenDoc(torch.tensor([1]), torch.tensor([True]))], 8)


def test_overlap_finds_shared_runs_only():
    """Calibrating on the test flatters the result; a common phrase does not."""
    a = " ".join(f"w{i}" for i in range(30))
    found = ngram_overlap(["unrelated words here", a.upper()], ["x " + " ".join(f"w{i}" for i in range(5, 19)), "w1 w2"], n=13)
    assert [(o.a_doc, o.b_doc) for o in found] == [(1, 0), (1, 0)]
    assert ngram_overlap(["same short text"], ["Same  short\ntext"])[0].ngram == "same short text"


def test_fingerprint_sees_text_mask_and_tokens(tokenizer):
    """Two texts with equal words but another loss mask are not the same measurement."""
    def mark(doc):
        return text_fingerprint([doc], tokenize_documents([doc], tokenizer), tokenizer)

    plain, masked = mark(Document("the cat")), mark(Document("the cat", (("the", False), (" cat", True))))
    assert plain == mark(Document("the cat"))
    assert plain["text_sha256"] != masked["text_sha256"] and plain["token_ids_sha256"] != masked["token_ids_sha256"]
