"""Readers, the split by document, packing, and what bad text is answered with."""

import gzip
import itertools
import json
import pickle
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sentei import data
from sentei.data.read import python_documents

SPECIAL = {"[UNK]": 0, "[EOS]": 1, "[BOS]": 2, "[CLS]": 3, "[SEP]": 4}


def words_tokenizer(frame: str = "", **special: str) -> PreTrainedTokenizerFast:
    """One token a word, "w0" ... "w99"; `frame` is the tokenizer's own template of special tokens around a text."""
    vocabulary = SPECIAL | {f"w{index}": index + 10 for index in range(100)} | {"a": 110}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[(token, index) for token, index in SPECIAL.items() if token in frame]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def stories(tmp_path):
    """200 documents of 10 words, each told by its first."""
    rows = [{"text": f"story{index} " + "word " * 9} for index in range(200)]
    return write_jsonl(tmp_path / "stories.jsonl", rows)


# --- readers


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    documents = ["first text", "second\ntext", "third é"]
    rows = [{"text": document} for document in documents]
    plain = write_jsonl(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (plain, packed, table):
        assert data.read_documents(path) == documents
        assert data.read_text(path) == "first text\n\nsecond\ntext\n\nthird é"


def test_blank_and_null_rows_are_dropped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "  "}, {"text": None}, {"text": "one"}])
    assert data.read_documents(path) == ["one"]


def test_another_field(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "id": 1}])
    assert data.read_documents(path, text_field="body") == ["one"]


def test_folder_in_the_order_of_names_without_hidden_and_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"text": "c"}])
    write_jsonl(tmp_path / ".cache" / "d.jsonl", [{"text": "hidden"}])
    (tmp_path / "README.md").write_text("no document")
    assert data.read_documents(tmp_path) == ["a", "b", "c"]


def test_wikitext_is_split_at_top_level_headings(tmp_path):
    article = " \n = {} = \n \n Text of it . \n \n = = Section = = \n \n a = b = c \n More . \n"
    path = tmp_path / "wiki.txt"
    path.write_text("".join(article.format(title) for title in ("One", "Two", "Three")))
    documents = data.read_documents(path)
    assert [document.split("\n")[0].strip() for document in documents] == ["= One =", "= Two =", "= Three ="]
    assert all(document.count("Section") == 1 for document in documents)


def test_running_text_becomes_contiguous_runs_at_blank_lines(tmp_path):
    paragraphs = [f"Paragraph {index} " + "has words " * 40 for index in range(300)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = data.read_documents(path)
    assert "".join(documents) == path.read_text()
    assert all(document.startswith("Paragraph") for document in documents)
    assert max(map(len, documents)) <= 4000
    assert len(documents) >= 30


def test_text_without_any_line_end_is_cut_between_words(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text(" ".join(["word"] * 5000))
    documents = data.read_documents(path)
    assert len(documents) >= 6
    assert all(document.split() == ["word"] * len(document.split()) for document in documents)


def test_text_file_as_it_stands_and_wikitext_by_the_published_protocol(tmp_path):
    content = " \n = Title = \n \n One . \n"
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "wiki.test.raw").write_text(content)
    assert data.read_text(tmp_path / "a.txt") == content
    # The rows of the Hugging Face data set, "" for a blank line, joined by "\n\n".
    assert data.read_text(tmp_path / "wiki.test.raw") == "\n\n".join(["", " = Title = \n", "", " One . \n"])


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert data.read_text(tmp_path / "a.txt") == "one\ntwo\n"


def test_python_docs_repeat_no_paragraph():
    seen = set()
    for document in python_documents():
        paragraphs = {paragraph.strip() for paragraph in document.split("\n\n")} - {""}
        assert not paragraphs & seen
        seen |= paragraphs
    assert sum(map(len, seen)) > 200_000


# --- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "is empty"),
        ("a.txt", b"text\0more", "binary file .NUL byte at offset 4"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text .byte 0xe9 at offset 3"),
        ("a.csv", b"a,b", "unknown kind; expected a file ending in .txt"),
        ("a.pkl", pickle.dumps(["text"]), "unknown kind"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n\n["two"]\n', "line 3 is a list"),
        ("a.jsonl", b'{"body": "one", "id": 3}\n', "line 1 has no field 'text'; its fields are: body, id"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: the field 'text' is int"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}' * 999, mtime=0)[:-20], "not a whole gzip file"),
        ("a.parquet", b"PAR1 and nonsense", "not a parquet file that can be read"),
        ("a.parquet", b"", "is empty"),
    ],
)
def test_bad_files_are_told_in_one_line_with_their_path(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_field_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "one"}]), path)
    with pytest.raises(ValueError, match="no field 'text'; its fields are: body"):
        data.read_documents(path)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        data.load(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="holds no text"):
        data.load(str(tmp_path))


def test_unknown_weights(stories):
    for spec, message in [
        (f"{stories}=0.5,python-docs", "some have none"),
        (f"{stories}=much,python-docs=1", "is 'much'; expected a number"),
        ({str(stories): 0.0}, "above 0"),
        ([], "no text is named"),
        ("", "no text is named"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.load(spec)


# --- Hugging Face datasets, without a network


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


class Rows(dict):
    column_names = property(list)


def test_dataset_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Rows(text=[f"row {index}" for index in range(20)])

    fake_datasets(monkeypatch, load_dataset)
    text = data.load("owner/name:part", split="validation")
    data.load("plain")
    assert asked == [("owner/name", "part", "validation"), ("plain", None, "train")]
    assert len(text.train + text.validation + text.test) == 20


def test_dataset_that_cannot_be_had(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach 'name' on the Hub\nwith a long tail")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match=r"'owner/name' is no file or folder here.*Couldn't reach") as error:
        data.load("owner/name")
    assert "\n" not in str(error.value)


def test_dataset_without_the_field(monkeypatch):
    fake_datasets(monkeypatch, lambda *_, **__: Rows(body=["one"]))
    with pytest.raises(ValueError, match="no field 'text'; its fields are: body"):
        data.load("owner/name")


def test_split_of_a_file_is_refused(stories):
    with pytest.raises(ValueError, match="is for Hugging Face datasets"):
        data.load(str(stories), split="test")


# --- parts


def parts(text):
    return set(text.train), set(text.validation), set(text.test)


def test_parts_are_disjoint_complete_and_of_the_asked_size(stories):
    text = data.load(str(stories), validation_fraction=0.2, test_fraction=0.1)
    train, validation, test = parts(text)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train | validation | test) == 200
    assert (len(train), len(validation), len(test)) == (140, 40, 20)


def test_copies_of_a_document_land_in_one_part(tmp_path):
    rows = [{"text": f"story {index % 20}" + "\n" * (index // 20)} for index in range(100)]
    text = data.load(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert sorted(text.train + text.validation + text.test) == sorted(f"story {index}" for index in range(20))


def test_one_seed_one_split(stories, tmp_path):
    one, again, other = data.load(str(stories)), data.load(str(stories)), data.load(str(stories), seed=1)
    assert one == again
    assert parts(one) != parts(other)
    assert one.sha256 != other.sha256
    reordered = tmp_path / "reordered.jsonl"
    reordered.write_text("".join(reversed(stories.read_text().splitlines(keepends=True))))
    assert parts(data.load(str(reordered))) == parts(one)


def test_a_mixture_or_a_limit_trains_on_nothing_that_the_source_alone_holds_out(stories):
    alone, docs = data.load(str(stories)), data.load()
    for text in (
        data.load(str(stories), limit=30),
        data.load([str(stories), "python-docs"]),
        data.load(f"{stories}=0.5,python-docs=0.5"),
    ):
        for part in ("train", "validation", "test"):
            assert set(getattr(text, part)) <= set(getattr(alone, part)) | set(getattr(docs, part))
            assert getattr(text, part)


def test_limit_is_met_and_is_of_the_whole_source(stories):
    text = data.load(str(stories), limit=50)
    documents = text.train + text.validation + text.test
    assert len(documents) == 50
    numbers = [int(document.split()[0].removeprefix("story")) for document in documents]
    assert max(numbers) > 150
    with pytest.raises(ValueError, match="one for each part"):
        data.load(str(stories), limit=2)


def test_a_document_of_two_sources_stays_in_one_part(tmp_path):
    shared = [f"shared {index}" for index in range(40)]
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in shared])
    two = write_jsonl(
        tmp_path / "b.jsonl", [{"text": text} for text in shared + [f"own {index}" for index in range(9)]]
    )
    text = data.load([str(one), str(two)])
    train, validation, test = parts(text)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_one_giant_document_does_not_become_a_part(tmp_path):
    rows = [{"text": "giant " * 5000}] + [{"text": f"small {index} " * 10} for index in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(10):
        assert any(document.startswith("giant") for document in data.load(str(path), seed=seed).train)


def test_few_documents_still_give_three_parts_and_fewer_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "two", "three")])
    assert sorted(len(part) for part in parts(data.load(str(path)))) == [1, 1, 1]
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in ("one", "two")])
    with pytest.raises(ValueError, match=r"found 2 documents .* too few"):
        data.load(str(path))
    assert data.load(str(path), validation_fraction=0, test_fraction=0).train == ["one", "two"]


def test_weights_are_shares_of_characters_in_every_part(tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": f"long{index} " * 20} for index in range(400)])
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": f"short{index}"} for index in range(2000)])
    text = data.load(f"{long}=0.75,{short}=0.25")
    for part in (text.train, text.validation, text.test):
        share = sum(len(document) for document in part if document.startswith("long")) / sum(map(len, part))
        assert share == pytest.approx(0.75, abs=0.04)
        assert len(set(part)) == len(part)
    # In turns, not one source after the other.
    kinds = [document[0] for document in text.train]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 50


def test_the_default_text_has_three_usable_parts():
    text = data.load()
    assert text.name == "python-docs"
    assert min(map(len, parts(text))) >= 3
    sizes = [sum(map(len, part)) for part in (text.train, text.validation, text.test)]
    assert sizes[0] > 200_000
    assert min(sizes[1:]) > 20_000


def test_fingerprint_knows_where_documents_and_parts_end():
    prints = {
        data.fingerprint(["ab", "c"]),
        data.fingerprint(["a", "bc"]),
        data.fingerprint(["abc"]),
        data.fingerprint(["ab"], ["c"]),
        data.fingerprint(["ab"], [], ["c"]),
    }
    assert len(prints) == 5


# --- blocks


def test_packing_with_an_end_after_each_document():
    documents = [words(0, 1, 2), words(3, 4), words(5, 6, 7, 8)]
    blocks = data.blocks(documents, words_tokenizer(eos_token="[EOS]"), 4)
    assert blocks.dtype == torch.long
    assert blocks.tolist() == [[10, 11, 12, 1], [13, 14, 1, 15], [16, 17, 18, 1]]


def test_every_block_starts_with_bos_where_the_tokenizer_adds_it():
    tokenizer = words_tokenizer("[BOS] $A", eos_token="[EOS]", bos_token="[BOS]")
    blocks = data.blocks([words(0, 1, 2, 3, 4)], tokenizer, 3)
    assert blocks.tolist() == [[2, 10, 11], [2, 12, 13], [2, 14, 1]]


def test_blocks_of_an_encoder_are_framed():
    tokenizer = words_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    blocks = data.blocks([words(0, 1, 2), words(3, 4)], tokenizer, 4)
    assert blocks.tolist() == [[3, 10, 11, 4], [3, 12, 4, 4], [3, 13, 14, 4]]


def test_too_little_text_says_how_much_there_is():
    tokenizer = words_tokenizer(eos_token="[EOS]")
    with pytest.raises(ValueError, match="found 2 blocks of 4 tokens, need 5; lower seq_len or give more text"):
        data.blocks([words(*range(10))], tokenizer, 4, num=5)
    with pytest.raises(ValueError, match="found 0 blocks of 64 tokens, need 1"):
        data.blocks([words(*range(10))], tokenizer, 64)


def test_seeded_blocks_are_a_repeatable_draw_from_many_documents():
    tokenizer = words_tokenizer(eos_token="[EOS]")
    documents = [words(*[index] * 31) for index in range(50)]  # 8 blocks of 4 each
    every = data.blocks(documents, tokenizer, 4)
    one, again, other = (data.blocks(documents, tokenizer, 4, num=20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one) == 20
    assert len(one[:, 0].unique()) > 10
    shuffled = data.blocks(documents, tokenizer, 4, seed=0)
    assert sorted(shuffled.tolist()) == sorted(every.tolist())
    assert not torch.equal(shuffled, every)
    assert torch.equal(data.blocks(documents, tokenizer, 4, num=20), every[:20])


def test_batches_keep_order_and_the_rest():
    blocks = torch.arange(10).view(5, 2)
    batches = data.batches(blocks, 2)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), blocks)


def test_a_large_text_is_not_tokenised_to_its_end(monkeypatch):
    documents, read = [words(*range(40)) for _ in range(500)], []
    tokenizer = words_tokenizer(eos_token="[EOS]")

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **kwargs):
            read.append(text)
            return tokenizer(text, **kwargs)

    blocks_NT = data.blocks(documents, Counting(), 10, most=20, seed=0)
    assert len(blocks_NT) == 20 and len(read) < 100
    assert len(data.blocks(documents[:2], Counting(), 10, most=20, seed=0)) == 8  # all there are
    everything = data.blocks(documents[:9], tokenizer, 10, seed=0)
    assert torch.equal(data.blocks(documents[:9], tokenizer, 10, most=10_000, seed=0), everything)
