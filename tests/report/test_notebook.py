"""What a notebook shows of results, structures, measurements and plans."""

import dataclasses

import pytest
import torch
from torch import nn

import idap
from idap.report.page import MOST, table_display
from idap.steps import Contest
from tests.compress.tiny import config, task, train_net
from tests.report.runs import HOSTILE
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def result():
    return idap.compress(train_net(), task(), config())


def test_a_result_shows_itself(result):
    text = result._repr_html_()
    page = Page(text)
    assert "Net ✓ Goals reached Every goal was reached." in page.said
    assert "multiply-adds" in page.said and "accuracy (validation)" in page.said
    assert 'role="img"' in text and "<script" not in text
    assert len(text) < 20_000


def test_a_layer_that_filters_beat_is_no_step_of_the_curve(result):
    beaten = dataclasses.replace(result.steps[0], accepted=False, contest=Contest(layer=0.5, filters=0.4))
    shown = dataclasses.replace(result, steps=(beaten, *result.steps))._repr_html_()
    assert Page(shown).said == Page(result._repr_html_()).said
    refused = dataclasses.replace(beaten, contest=None)
    assert Page(dataclasses.replace(result, steps=(refused, *result.steps))._repr_html_()).said != Page(shown).said


def test_two_results_in_one_notebook_do_not_mix(result):
    other = dataclasses.replace(result, message="another one", reached=False, latency=0.6)
    assert not set(Page(result._repr_html_()).all("id")) & set(Page(other._repr_html_()).all("id"))
    said = Page(other._repr_html_()).said
    assert "✗ Goals not reached" in said and "latency 60.0 %" in said


def test_a_result_without_steps_has_no_curve(result):
    assert 'role="img"' not in dataclasses.replace(result, steps=())._repr_html_()


def test_text_stays_text(result):
    text = dataclasses.replace(result, message=HOSTILE, metric_name=HOSTILE)._repr_html_()
    assert "<script" not in text and "<img" not in text
    assert "<script" not in table_display(HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE)


def test_structures_measurements_and_plans_show_themselves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    structure = idap.analyze(idap.trace(net, (torch.zeros(2, 4),)))
    assert "0 neurons 8" in Page(structure._repr_html_()).said
    divergence = idap.Divergence("relative", {"0": torch.tensor([1.0, 3.0, float("nan")])}, {"block": 0.5}, ("gone",))
    assert repr(divergence) == "Divergence('relative', groups=1, units=2, blocks=1)"
    said = Page(divergence._repr_html_()).said
    assert "0 2 1 – 3" in said and "block 0.5 whole" in said and "Not measured: gone." in said
    plan = structure.plan({"0": (0, 2, 4)})
    assert repr(plan) == "Plan(1 group and 3 tensors cut, removed nothing)"
    assert "0 3 units left" in Page(plan._repr_html_()).said
    assert "Plan(0 groups and 0 tensors cut, removed nothing)" in Page(structure.plan({})._repr_html_()).said


def test_a_long_table_is_cut():
    said = Page(table_display("long", ["a"], [[str(row)] for row in range(MOST + 5)], bars=[0.5] * (MOST + 5))).said
    assert "5 more rows are not shown." in said
    assert f" {MOST - 1} " in said and f" {MOST} " not in said
