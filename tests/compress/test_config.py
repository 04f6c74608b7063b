"""Goals and settings: what is impossible is refused with the reason and the way out."""

import dataclasses

import pytest

from idap.compress.budget import Budget, budget_of
from idap.compress.config import Config, FilterStage, LayerStage, check_config
from idap.divergence.criteria import CRITERIA
from idap.errors import BudgetError, ConfigError
from idap.rebalance.run import Rebalance


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"macs": -0.5},
            r"^macs is the share of the original that may stay and must lie between 0 and 1, found -0\.5\. ",
        ),
        ({"macs": 0}, r"must lie between 0 and 1, found 0\. macs=0\.5 asks for half\.$"),
        ({"macs": 1}, r"found 1\. macs=0\.5"),
        ({"macs": 40}, r"found 40; for 40 % write 0\.4\. macs=0\.5 asks for half\.$"),
        ({"parameters": 12.5}, r"^parameters is the share .* found 12\.5; for 12\.5 % write 0\.125\. parameters=0\.5"),
        ({"macs": 300}, r"found 300\. macs"),
        ({"macs": float("nan")}, r"found nan\."),
        (
            {"max_drop": -0.01},
            r"^max_drop must be at least 0 and finite, found -0\.01; 0\.01 allows one point or percent\.$",
        ),
        ({"max_drop": float("nan")}, r"^max_drop must be at least 0 and finite, found nan"),
        ({"max_drop": None}, r"^there is no goal: set max_drop \(how much worse the metric may get\), or a target"),
        ({"max_relative_drop": -1}, r"^max_relative_drop must be at least 0 and finite, found -1;"),
        ({"worst_metric": float("inf")}, r"^worst_metric must be a finite number, found inf\.$"),
        ({"latency": 50}, r"^latency is the share of the original .* for 50 % write 0\.5\. latency=0\.5 asks for half"),
        ({"size": 1.5}, r"^size is the share of the original"),
    ],
)
def test_impossible_goals(settings, match):
    with pytest.raises(BudgetError, match=match):
        Config(**settings)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Config(criterion="largest"), r"^there is no criterion 'largest'; there are relative, fluctuation, "),
        (lambda: Config(ranking="local"), r"^ranking must be 'global' or 'uniform', found 'local'\.$"),
        (
            lambda: Config(cost="money"),
            r"^cost must be 'auto' or 'macs' or 'parameters' or 'latency', found 'money'\.$",
        ),
        (lambda: Config(cost_power="best"), r"^cost_power must be 'auto', found 'best'\.$"),
        (lambda: FilterStage(multiple=0), r"^filters\.multiple must be at least 1, found 0\.$"),
        (lambda: FilterStage(keep={"a*": 2}), r"^filters\.keep\['a\*'\] must lie in \[0, 1\], found 2\.$"),
        (lambda: Config(cost_power=1.5), r"^cost_power must lie in \[0, 1\], found 1\.5\.$"),
        (lambda: Config(filters_share=-0.1), r"^filters_share must lie in \[0, 1\], found -0\.1\.$"),
        (lambda: Config(calibration_batches=0), r"^calibration_batches must be at least 1, found 0\.$"),
        (lambda: FilterStage(first_share=0), r"^filters\.first_share must lie in \(0, 1\), found 0\.$"),
        (lambda: FilterStage(first_share=1), r"^filters\.first_share must lie in \(0, 1\), found 1\.$"),
        (lambda: FilterStage(min_share=0), r"^filters\.min_share must lie in \(0, 1\), found 0\.$"),
        (lambda: FilterStage(min_keep=0), r"^filters\.min_keep must lie in \(0, 1\], found 0\.$"),
        (lambda: FilterStage(steps=-1), r"^filters\.steps must be at least 0, found -1\.$"),
        (lambda: FilterStage(growth=-1), r"^filters\.growth must be at least 0, found -1\.$"),
        (
            lambda: FilterStage(schedule="slow"),
            r"^filters\.schedule must be 'growing' or 'even' or 'one-shot', found 'slow'\.$",
        ),
        (
            lambda: Config(filters=FilterStage(schedule="even")),
            r"^filters\.schedule='even' needs a target, and there",
        ),
        (lambda: LayerStage(tune="some"), r"^layers\.tune must be 'all' or 'neighbours', found 'some'\.$"),
        (
            lambda: Config(order="random"),
            r"^order must be 'filters-layers' or 'layers-filters' or 'interleaved', found",
        ),
        (
            lambda: Config(order="interleaved"),
            r"^order='interleaved' compares units with blocks, and criterion 'innovation' scores no blocks; take one ",
        ),
        (
            lambda: Config(order="interleaved", criterion="relative", ranking="uniform"),
            r"^order='interleaved' is one ranking over everything: it needs ranking='global'\.$",
        ),
        (lambda: Config(latency_batch=0), r"^latency_batch must be at least 1, found 0\.$"),
        (lambda: Config(macs="0.5"), r"^macs must be a number, found '0\.5'\.$"),
        (lambda: Config(seed=2**70), r"^seed must lie in \[0, 9\.22337e\+18\), found "),
        (lambda: Config(swap="no"), r"^swap must be True or False, found 'no'\.$"),
        (lambda: Config(contracts=3), r"^contracts must be several of a text or None, found 3\.$"),
        (lambda: Config(criterion=["a"]), r"^there is no criterion \['a'\]; "),
        (lambda: FilterStage(keep=None), r"^filters\.keep must be a mapping of a text to a number, found None\.$"),
        (lambda: FilterStage(keep={1: 0.5}), r"^filters\.keep must be a mapping of a text to a number, found \{1: 0"),
        (lambda: FilterStage(multiple=2.5), r"^filters\.multiple must be a whole number, found 2\.5\.$"),
        (lambda: FilterStage(growth=1e6), r"^filters\.growth must be at most 100, found 1e\+06\.$"),
        (lambda: Rebalance(rows=300.5), r"^rebalance\.rows must be a whole number, found 300\.5\.$"),
        (lambda: Config(max_drop=True), r"^max_drop must be a number, found True\.$"),
        (lambda: Config(calibration_batches=2.5), r"^calibration_batches must be a whole number, found 2\.5\.$"),
        (lambda: FilterStage(steps=2.5), r"^filters\.steps must be a whole number, found 2\.5\.$"),
        (lambda: FilterStage(first_share=None), r"^filters\.first_share must be a number, found None\.$"),
        (
            lambda: Config(filters={"steps": 1}),
            r"^filters must be an idap\.FilterStage\(\.\.\.\), found \{'steps': 1\}\.$",
        ),
        (lambda: Config(recovery=None), r"^recovery must be an idap\.Recovery\(\.\.\.\), found None\.$"),
        (
            lambda: Config(contracts="logits"),
            r"^contracts must be several names, found 'logits'; write \('logits',\)\.$",
        ),
        (lambda: check_config({"macs": 0.5}), r"^config must be an idap\.Config\(\.\.\.\), found \{'macs': 0\.5\}\.$"),
        (lambda: LayerStage(removals=-1), r"^layers\.removals must be at least 0, found -1\.$"),
        (lambda: LayerStage(short_list=0), r"^layers\.short_list must be at least 1, found 0\.$"),
        (lambda: LayerStage(patience=0), r"^layers\.patience must be at least 1, found 0\.$"),
        (
            lambda: Config(filters=FilterStage(steps=0), layers=LayerStage(removals=0)),
            r"^filters\.steps and layers\.removals are both 0, so nothing could be removed\.$",
        ),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_own_criteria_are_taken_for_what_they_are():
    def taylor(scene):
        return {}

    assert Config(criterion=taylor).powers == (0.0,)
    assert Config(criterion=CRITERIA["taylor"]).powers == Config(criterion="taylor").powers == (1.0,)
    Config(order="interleaved", criterion=taylor)  # whether it scores blocks shows when it is asked


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"filters": FilterStage(keep={"*": 1.0})},
            r" Hardly anything may be removed: lower filters\.keep or filters\.min_keep\.",
        ),
        (
            {"filters": FilterStage(steps=0)},
            r" Hardly anything may be removed: let stage 1 take steps \(filters\.steps is 0\)\.",
        ),
        (
            {"layers": LayerStage(removals=0)},
            r" lower filters\.min_keep, or let stage 2 remove layers \(layers\.removals is 0\)\.$",
        ),
    ],
)
def test_a_target_out_of_reach_names_what_holds_it_back(settings, told):
    with pytest.raises(BudgetError, match=told):
        budget_of(Config(macs=0.2, **settings), 0.9, higher_is_better=True, least={"macs": 1.0})


def test_edges_are_allowed():
    Config(max_drop=0, filters_share=0, cost_power=0, filters=FilterStage(min_keep=1))
    Config(max_drop=None, parameters=0.999, filters_share=1, cost_power=1)


def test_the_power_follows_the_criterion_unless_it_is_set():
    assert (Config(criterion="relative").powers, Config(criterion="paper").powers) == ((0.0,), (1.0,))
    assert (Config(cost_power=0.5).powers, Config(criterion="paper", cost_power=0).powers) == ((0.5,), (0,))
    assert Config(cost_power="auto").powers == (0.0, 0.5, 1.0)


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        Config().macs = 0.5


# -------------------------------------------------------------------------------------------------------------- budget

LEAST = {"macs": 0.3, "parameters": 0.25, "size": 0.2, "latency": 0.6}
WHOLE = dict.fromkeys(LEAST, 1.0)


def budget(higher=True, baseline=0.9, **goals):
    return budget_of(Config(**goals), baseline, higher_is_better=higher, least=LEAST)


def test_the_worst_metric_lies_on_the_side_of_the_loss():
    high, low = budget(max_drop=0.1), budget(higher=False, baseline=2.0, max_drop=0.5)
    assert [high.holds(metric) for metric in (0.95, 0.81, 0.79)] == [True, True, False]
    assert [low.holds(metric) for metric in (1.0, 2.5, 2.6)] == [True, True, False]


def test_the_tightest_bound_counts():
    bounds = {"max_drop": 0.2, "max_relative_drop": 0.1, "worst_metric": 0.75}
    assert budget(**bounds).worst == pytest.approx(0.81)
    assert budget(**{**bounds, "worst_metric": 0.85}).worst == 0.85
    assert budget(higher=False, baseline=20.0, max_drop=3, max_relative_drop=0.01).worst == pytest.approx(20.2)
    assert budget(higher=False, baseline=-2.0, max_drop=None, max_relative_drop=0.5).worst == -1.0
    assert budget(max_drop=None, worst_metric=0.5).worst == 0.5


def test_the_point_that_is_allowed_by_default_does_not_tighten_another_bound():
    assert budget().worst == pytest.approx(budget(max_drop=0.01).worst)
    assert budget(macs=0.5).worst == budget().worst
    assert budget(worst_metric=0.5).worst == 0.5
    assert budget(higher=False, baseline=20.0, max_relative_drop=0.5).worst == 30.0
    assert budget(max_drop=0.01, worst_metric=0.5).worst == budget().worst
    assert dataclasses.replace(Config(), max_relative_drop=0.5).drop is None


def test_only_a_latency_may_be_above_its_target_by_the_noise_of_a_clock():
    goals = Budget(None, True, {"macs": 0.5, "latency": 0.5})
    assert goals.misses({"macs": 0.5, "latency": 0.509}) == []
    assert goals.misses({"macs": 0.509, "latency": 0.509}) == ["macs"]
    assert goals.misses({"macs": 0.5, "latency": 0.511}) == ["latency"]
    assert goals.misses({"latency": 0.4}) == []  # of the others nothing is known


def test_an_original_outside_the_budget_is_refused():
    with pytest.raises(BudgetError, match=r"^the original itself does not keep the budget: its metric .* is 0\.9, "):
        budget(worst_metric=0.95)
    with pytest.raises(BudgetError, match=r"worst_metric allows 1\.5"):
        budget(higher=False, baseline=2.0, worst_metric=1.5)


def test_without_a_drop_any_metric_is_within_the_budget():
    assert budget(max_drop=None, macs=0.5).holds(-1e9)


def shares(macs, parameters):
    return {"macs": macs, "parameters": parameters}


def test_targets_are_shares_of_the_original():
    both = budget(macs=0.5, parameters=0.25)
    assert both.targets == {"macs": 0.5, "parameters": 0.25}
    found = [both.is_reached(shares(*pair)) for pair in ((0.5, 0.25), (0.501, 0.25), (0.5, 0.26), (0.1, 0.1))]
    assert found == [True, False, False, True]
    assert both.shortfall(shares(0.75, 0.25)) == 0.5
    assert both.shortfall(shares(0.75, 0.75)) == 2.0


def test_without_a_target_there_is_always_more_to_gain():
    assert not budget().is_reached(shares(0.001, 0.001))


def test_part_way():
    half = budget(macs=0.5, parameters=0.5, latency=0.7).part_way(WHOLE, 0.4)
    assert half.targets == pytest.approx({"macs": 0.8, "parameters": 0.8, "latency": 0.88})
    assert budget(macs=0.5).part_way(WHOLE, 1.0).targets == {"macs": 0.5}
    assert budget(macs=0.5).part_way(WHOLE, 0.0).is_reached(WHOLE)
    assert budget().part_way(WHOLE, 0.4) == budget()
    assert budget(macs=0.5).part_way({"macs": 0.3}, 0.5).targets == {"macs": 0.5}  # it is below already


def test_a_target_out_of_reach_names_what_can_be_reached():
    with pytest.raises(
        BudgetError,
        match=r"^macs=0\.2 can't be reached: even with everything removable gone, 30\.0% of the macs would stay\. Ask "
        r"for macs=0\.31 or more, or lower filters\.min_keep\.$",
    ):
        budget(macs=0.2)
    with pytest.raises(BudgetError, match=r"^parameters=0\.2 can't be reached: .* 25\.0% of the parameters would stay"):
        budget(parameters=0.2)
    with pytest.raises(BudgetError, match=r"^latency=0\.5 can't be reached: .* 60\.0% of the latency would stay"):
        budget(latency=0.5)
    assert isinstance(budget(macs=0.31), Budget)
