"""The shared subjects are the published networks, and what they are judged on is drawn the same way each time."""

import importlib.util
from itertools import pairwise

import pytest
import torch

from benchmarks import subjects
from benchmarks.subjects import NAMES, Tokenizer, build, sample
from idap.graph.trace import trace
from idap.structure.analysis import analyze

FIRST_512 = {"resnet20": 91.21, "resnet56": 94.14, "vit": 67.97}
STORY_TOKENS = [374, 330, 223, 425, 457]


@pytest.fixture(scope="module", params=NAMES)
def subject(request, real_data):
    if request.param == "llama" and importlib.util.find_spec("transformers") is None:
        pytest.skip("the language model needs transformers")
    return build(request.param, real_data)


@pytest.fixture(scope="module")
def tokenizer(real_data):
    return Tokenizer(real_data / "weights" / "stories260k_tok512.bin")


def equal(batch, other):
    parts, others = ([*b.values()] if isinstance(b, dict) else b for b in (batch, other))
    return all(torch.equal(part, same) for part, same in zip(parts, others, strict=True))


class TestSubjects:
    def test_the_network_is_the_published_one(self, subject):
        if subject.metric == "loss":
            assert subject.reproduce() == pytest.approx(subject.published, abs=1e-3)
        else:  # all 10,000 images give what is published, and take a minute
            found = subject.quality(subject.model, subject.test[:2])
            assert found == pytest.approx(FIRST_512[subject.name], abs=0.2)
            assert sum(len(labels) for _, labels in subject.test) == 10_000

    def test_the_loss_is_the_quality_of_a_text(self, subject):
        batch = subject.test[0]
        with torch.no_grad():
            loss = float(subject.loss(subject.run(subject.model, batch), batch))
        expected = subject.quality(subject.model, [batch]) if subject.metric == "loss" else 1.0
        assert loss == pytest.approx(expected, rel=1e-5 if subject.metric == "loss" else 0.9)

    def test_calibration_follows_its_seed(self, subject):
        first, again, other = (subject.calibration(20, seed) for seed in (0, 0, 1))
        assert sum(len(batch["input_ids"] if isinstance(batch, dict) else batch[1]) for batch in first) == 20
        assert all(map(equal, first, again))
        assert not any(map(equal, first, other))

    def test_what_can_be_removed_of_it(self, subject):
        args, kwargs = subject.example()
        structure = analyze(trace(subject.model, args, kwargs), contracts=subject.contracts)
        sizes = {}
        for group in structure.groups:
            sizes.setdefault(group.kind, []).append(group.size)
        if subject.name == "vit":
            assert (sizes["heads"], sizes["neurons"]) == ([8] * 6, [256] * 6)
        elif subject.name == "llama":
            assert sorted(sizes["heads"]) == [2] * 5 + [4] * 5
            assert sorted(sizes["neurons"]) == [64] + [172] * 5
        else:
            blocks = {"resnet20": 3, "resnet56": 9}[subject.name]
            inner = [group for group in structure.groups if [w.weight[-12:] for w in group.writers] == ["conv1.weight"]]
            stages = [group.size for group in inner if group.name.startswith("layer")]
            assert stages == [size for size in (16, 32, 64) for _ in range(blocks)]


def test_stories_are_whole_and_split(real_data):
    pytest.importorskip("transformers")
    subject = build("llama", real_data)
    assert [batch["input_ids"].shape[1] for batch in [*subject.choosing, *subject.test]] == STORY_TOKENS
    assert len(subject.choosing) == 2
    assert all(batch["input_ids"][0, 0] == subjects.BOS for batch in subject.test)


def test_texts_sound_like_the_model(real_data):
    pytest.importorskip("transformers")
    subject = build("llama", real_data)
    tokens = sample(subject.model, 8, 64, seed=0)
    assert tokens.shape == (8, 64)
    assert bool((tokens[:, 0] == subjects.BOS).all())
    # Sampled at temperature 1, a text costs the model what a real one does; random tokens cost more than ln 512.
    assert 0.9 < subject.quality(subject.model, [{"input_ids": tokens}]) < 1.7


@pytest.mark.parametrize("text", ["Once upon a time", "“Wow”, said Zoë.\nYes!", "", "  two  spaces"])
def test_text_survives_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_follow_the_scores(tokenizer):
    tokens = tokenizer.encode("Once upon a time")
    pieces = [tokenizer.pieces[token] for token in tokens]
    assert b"".join(pieces) == b" Once upon a time"
    assert len(tokens) < 8
    known = set(tokenizer.pieces)
    assert not any(left + right in known for left, right in pairwise(pieces))


def test_unknown_subjects_are_named(tmp_path):
    with pytest.raises(ValueError, match="no subject 'resnet'; subjects are resnet20, resnet56, vit, llama"):
        build("resnet", tmp_path)
