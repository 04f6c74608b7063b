"""Tables of texts: every form gives the same task, columns are found or asked for, and rows are checked early."""

import json

import pytest

from idap.data.rows import find_columns, read_records
from idap.data.sentences import label_names, sentences
from idap.errors import ConfigError, TaskError
from tests.data import small_data


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    small_data.tokenizer(folder)
    return str(folder)


def batches(task, split="val"):
    return list(task.batches(split))


class TestForms:
    @pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.tsv.gz", "t.jsonl.gz"])
    def test_each_gives_the_same(self, tmp_path, words, name):
        task = sentences(small_data.table(tmp_path / name), tokenizer=words, batch_size=4)
        [first, *_] = batches(task)
        known = dict(zip(("[PAD]", "[UNK]", *small_data.WORDS), range(12), strict=True))
        text, label = small_data.sentence(2)  # the first of dev
        assert first["input_ids"][0][first["attention_mask"][0] == 1].tolist() == [known[word] for word in text.split()]
        assert first["labels"][0] == int(label == "positive")
        assert [sum(len(batch["labels"]) for batch in batches(task, part)) for part in ("train", "val", "test")] == [
            32, 16, 16,
        ]  # fmt: skip
        assert task.notes == (
            "the texts are in column 'sentence', the labels in 'label', the parts in 'split'",
            "labels are 0 = 'negative', 1 = 'positive'",
        )

    def test_a_folder_of_tables(self, tmp_path, words):
        for part in ("train", "dev"):
            small_data.table(tmp_path / f"{part}.csv", split=False, count=8)
        task = sentences(tmp_path, tokenizer=words)
        assert task.test is None
        assert len(batches(task)[0]["labels"]) == 8

    def test_quotes_in_csv_and_none_in_tsv(self, tmp_path):
        (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",1\n')
        (tmp_path / "a.tsv").write_text('text\tlabel\nsay "no\t1\n')
        assert next(read_records(tmp_path / "a.csv"))[1]["text"] == 'one, "two"\nthree'
        assert next(read_records(tmp_path / "a.tsv"))[1]["text"] == 'say "no'

    def test_padding(self, tmp_path, words):
        file = small_data.table(tmp_path / "t.tsv")
        widths = {batch["input_ids"].shape[1] for batch in batches(sentences(file, tokenizer=words, batch_size=4))}
        assert max(widths) <= 6
        [batch] = batches(sentences(file, tokenizer=words, max_length=9, pad_to_max=True))
        assert batch["input_ids"].shape == (16, 9)
        assert not batch["attention_mask"][:, -1].any()
        assert not batch["input_ids"][batch["attention_mask"] == 0].any()
        assert batches(sentences(file, tokenizer=words, max_length=3))[0]["input_ids"].shape == (16, 3)

    def test_pairs(self, tmp_path, words):
        rows = [{"sentence1": "good", "sentence2": "bad film", "label": number % 2} for number in range(10)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = sentences(tmp_path / "p.jsonl", tokenizer=words)
        assert batches(task)[0]["input_ids"].tolist() == [[2, 5, 9]]  # good, bad, film
        assert "'sentence1' and 'sentence2'" in task.notes[0]
        alone = sentences(tmp_path / "p.jsonl", tokenizer=words, text="sentence1")
        assert batches(alone)[0]["input_ids"].shape == (1, 1)

    def test_val_is_taken_off_train_and_that_is_said(self, tmp_path, words):
        task = sentences(small_data.table(tmp_path / "t.tsv", split=False), tokenizer=words, val_share=0.25)
        assert task.notes[-1].startswith("there is no validation data: 16 of the 64 training rows")
        assert sum(len(batch["labels"]) for batch in batches(task)) == 16


class TestLabels:
    def names(self, tmp_path, values, **keys):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in values))
        return label_names(tmp_path / "t.jsonl", **keys)

    def test_numbers_are_sorted_as_numbers(self, tmp_path):
        assert self.names(tmp_path, [10, 9, 0, 9]) == ["0", "9", "10"]
        assert self.names(tmp_path, [1.0, 0.0]) == ["0", "1"]
        assert self.names(tmp_path, ["b", "a", "b"]) == ["a", "b"]

    def test_the_order_may_be_said(self, tmp_path):
        assert self.names(tmp_path, ["b", "a"], labels=["b", "a", "c"]) == ["b", "a", "c"]
        with pytest.raises(ConfigError, match=r"line 2: label 'a' is not in data\.labels, \['b'\]"):
            self.names(tmp_path, ["b", "a"], labels=["b"])

    def test_the_order_of_the_model_is_taken_where_the_labels_are_its_own(self, tmp_path, words):
        file = small_data.table(tmp_path / "t.tsv")
        task = sentences(file, tokenizer=words, labels_like=["POSITIVE", "NEGATIVE"])
        assert task.notes[1] == "labels are 0 = 'positive', 1 = 'negative'"
        task = sentences(file, tokenizer=words, labels_like=["happy", "sad"])
        assert task.notes[1] == "labels are 0 = 'negative', 1 = 'positive'"


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "keys", "text"),
        [
            (
                "sentence,labl\nx,1\n",
                {},
                r"it is not clear which column holds the labels; the columns are 'sentence', 'labl'",
            ),
            ("a,b,label\nx,y,1\n", {}, r"it is not clear which column holds the texts.*Set data\.text = \"a\""),
            ("sentence,label\nx,1\n", {"label": "lable"}, r"no column 'lable' \(data\.label\).*did you mean 'label'"),
            ("text,label\nx\n", {}, r"t\.csv, line 2: it has 1 values, the header 2 columns"),
            ("text,label\n", {}, "holds no rows; expected a header and rows below it"),
            ("text,text\nx,y\n", {}, "two columns have the same name"),
            ("text,label\nx,1\ny,1\n", {}, "train has the one label '1'; expected two or more"),
            ("split,text,label\ntrain,x,1\ntrain,y,0\nval,z,2\n", {}, r"line 4: label '2' is not in train"),
            ("split,text,label\nfirst,x,1\n", {}, "line 2: 'split' is 'first', expected train, val"),
            ("split,text,label\ntest,x,1\n", {}, "no row has 'split' = 'train'"),
        ],
    )
    def test_each_is_named(self, tmp_path, words, content, keys, text):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises((TaskError, ConfigError), match=text):
            sentences(tmp_path / "t.csv", tokenizer=words, **keys)

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("t.jsonl", b'{"text": "x", "label": 1}\n{"text"\n', "line 2 is not JSON"),
            ("t.jsonl", b"[1]\n", "line 1 is list, expected an object"),
            ("t.jsonl", b'{"text": "x", "label": 1}\n{"text": "y"}\n', "line 2: there is no value for 'label'"),
            ("t.tsv", b"text\tlabel\n\xff\t1\n", "is not a text in UTF-8"),
            ("t.tsv.gz", b"text\tlabel\n", "can't be read: Not a gzipped file"),
            ("t.xlsx", b"", "is not a known kind of table, expected .csv, .tsv, .jsonl"),
        ],
    )
    def test_broken_files(self, tmp_path, words, name, content, text):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TaskError, match=text):
            sentences(tmp_path / name, tokenizer=words)

    def test_no_tokenizer(self, tmp_path, words):
        file = small_data.table(tmp_path / "t.tsv")
        with pytest.raises(ConfigError, match=r"no tokenizer is given: set data\.tokenizer"):
            sentences(file)
        with pytest.raises(TaskError, match=r"holds no tokenizer: none of tokenizer\.json.*save_pretrained"):
            sentences(file, tokenizer=str(tmp_path))
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(TaskError, match=r"can't be loaded: .*Set data\.tokenizer"):
            sentences(file, tokenizer=str(tmp_path))
        with pytest.raises(
            TaskError, match=r"token 11 is not among the model's 5 tokens: the tokenizer belongs to another"
        ):
            sentences(file, tokenizer=words, vocabulary=5)
        with pytest.raises(TaskError, match=r"tokens, and the model has 3 .* data\.max_length = 3, or less"):
            sentences(file, tokenizer=words, positions=3)
        sentences(file, tokenizer=words, positions=3, max_length=3)

    def test_a_missing_file_gets_its_neighbour(self, tmp_path, words):
        small_data.table(tmp_path / "reviews.tsv")
        with pytest.raises(TaskError, match=r"did you mean .*reviews\.tsv\?"):
            sentences(tmp_path / "review.tsv", tokenizer=words)


@pytest.mark.parametrize(
    ("name", "text", "pair", "rows"),
    [("sst2", "sentence", None, 872), ("cola", "sentence", None, 1043), ("rte", "sentence1", "sentence2", 277)],
)
def test_real_tables(real_data, words, name, text, pair, rows):
    file = real_data / f"{name}.tsv.gz"
    records = [values for _, values in read_records(file)]
    found = find_columns(list(records[0]), {}, name)
    assert (found.text, found.pair, found.label, found.split) == (text, pair, "label", "split")
    assert sum(values["split"] == "dev" for values in records) == rows
    assert label_names(file) == ["0", "1"]
