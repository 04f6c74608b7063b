import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idap.graph.labels import Dim, Labels, concat, constant_dim

SIZES = (2, 3, 4, 6, 8, 12)


def kept_slots(labels: Labels, dim: Dim, removed: set[int]) -> list[bool]:
    """Which slots of a dim are left when these atomic labels go."""
    return is_kept(labels.resolve(dim), removed)


def is_kept(settled: Dim, removed: set[int]) -> list[bool]:
    return (~np.isin(settled, list(removed))).all(axis=0).tolist()


def atoms(labels: Labels, *dims: Dim) -> list[int]:
    return sorted({int(label) for dim in dims for label in labels.resolve(dim).ravel()} - {0})


def assert_same_dim(labels: Labels, one: Dim, other: Dim, seed: int = 0) -> None:
    """The two dims keep the same slots whatever goes: tried with each label alone and with random sets."""
    one, other = labels.resolve(one), labels.resolve(other)
    every = atoms(labels, one, other)
    random = np.random.default_rng(seed)
    tries = [set(), set(every), *({atom} for atom in every)]
    tries += [{atom for atom in every if random.random() < share} for share in (0.1, 0.3, 0.6) for _ in range(2)]
    for removed in tries:
        assert is_kept(one, removed) == is_kept(other, removed)


# ------------------------------------------------------------------------------------------------------ single steps


def test_a_fixed_dim_has_no_labels_and_a_fresh_one_has_one_per_slot():
    labels = Labels()
    assert constant_dim(3).shape == (0, 3)
    assert labels.fresh_dim(3).tolist() == [[1, 2, 3]]
    assert len(labels) == 4


def test_a_dim_of_one_slot_cannot_shrink():
    assert Labels().fresh_dim(1).shape == (0, 1)


def test_unify_joins_slot_by_slot():
    labels = Labels()
    one, other = labels.fresh_dim(3), labels.fresh_dim(3)
    labels.unify(one, other)
    assert np.array_equal(labels.resolve(one), labels.resolve(other))
    assert len(atoms(labels, one, other)) == 3


def test_unify_with_a_fixed_dim_freezes():
    labels = Labels()
    dim = labels.fresh_dim(3)
    labels.because("it is the input")
    labels.unify(dim, constant_dim(3))
    assert labels.resolve(dim).shape == (0, 3)
    assert labels.reason(dim.ravel()) == "it is the input"


def test_the_reason_is_that_of_the_first_freeze():
    labels = Labels()
    dim = labels.fresh_dim(2)
    labels.because("first")
    labels.freeze_dim(dim)
    labels.because("second")
    labels.freeze_dim(dim)
    assert labels.reason(dim.ravel()) == "first"
    assert labels.reason(labels.fresh_dim(2).ravel()) == ""


def test_unify_of_different_sizes_is_our_own_mistake():
    labels = Labels()
    with pytest.raises(AssertionError, match="sizes 3 and 4 can't be one dimension"):
        labels.unify(labels.fresh_dim(3), labels.fresh_dim(4))


def test_split_refines_into_outer_and_inner_labels():
    labels = Labels()
    dim = labels.fresh_dim(6)
    outer, inner = labels.split(dim, [2, 3])
    assert outer.shape == (1, 2) and inner.shape == (1, 3)
    assert labels.resolve(dim).shape == (2, 6)
    first = int(outer[0, 0])
    assert kept_slots(labels, dim, {first}) == [False] * 3 + [True] * 3
    second = int(inner[0, 1])
    assert kept_slots(labels, dim, {second}) == [True, False, True] * 2


def test_split_then_merge_is_the_same_dim():
    labels = Labels()
    dim = labels.fresh_dim(12)
    parts = labels.split(dim, [2, 3, 2])
    assert_same_dim(labels, labels.merge(parts), dim)


def test_split_of_a_merged_dim_gives_its_parts_back():
    labels = Labels()
    outer, inner = labels.fresh_dim(2), labels.fresh_dim(3)
    found = labels.split(labels.merge([outer, inner]), [2, 3])
    assert np.array_equal(found[0], outer) and np.array_equal(found[1], inner)
    assert len(atoms(labels, outer, inner)) == 5


def test_merges_that_are_cut_differently_meet_at_their_common_cuts():
    """(4, 2) against (2, 4): the 8 slots are 2 x 2 x 2."""
    labels = Labels()
    one = labels.merge([labels.fresh_dim(4), labels.fresh_dim(2)])
    other = labels.merge([labels.fresh_dim(2), labels.fresh_dim(4)])
    labels.unify(one, other)
    assert_same_dim(labels, one, other)
    assert len(atoms(labels, one)) == 6


def test_merges_without_common_cuts_are_frozen():
    labels = Labels()
    one = labels.merge([labels.fresh_dim(4), labels.fresh_dim(3)])
    other = labels.merge([labels.fresh_dim(3), labels.fresh_dim(4)])
    labels.unify(one, other)
    assert not atoms(labels, one, other)


def test_fused_qkv_meets_three_projections():
    """q, k and v of one fused projection: 3 x heads x width, of which the 3 is fixed."""
    labels = Labels()
    fused = labels.fresh_dim(3 * 2 * 4)
    three, heads, width = labels.split(fused, [3, 2, 4])
    labels.freeze_dim(three)
    assert len(atoms(labels, fused)) == 6
    assert kept_slots(labels, fused, {int(heads[0, 1])}) == ([True] * 4 + [False] * 4) * 3
    assert kept_slots(labels, fused, {int(width[0, 0])}) == ([False] + [True] * 3) * 6


def test_a_label_that_a_whole_dim_depends_on_is_frozen():
    labels = Labels()
    label = labels.fresh(1)
    dim = np.broadcast_to(label, (1, 4)).astype(np.int64)
    assert labels.resolve(dim).shape == (0, 4)


def test_a_row_of_repeated_labels_ties_what_it_meets():
    labels = Labels()
    two, four = labels.fresh_dim(2), labels.fresh_dim(4)
    labels.unify(concat([two, two]), four)
    assert_same_dim(labels, four, concat([two, two]))
    assert len(atoms(labels, four)) == 2


def test_concat_pads_with_slots_that_need_nothing():
    labels = Labels()
    product = labels.merge([labels.fresh_dim(2), labels.fresh_dim(2)])
    dim = concat([product, constant_dim(2), labels.fresh_dim(2)])
    assert dim.shape == (2, 8)
    assert kept_slots(labels, dim, set(atoms(labels, dim))) == [False] * 4 + [True] * 2 + [False] * 2


def test_a_label_made_of_itself_and_another_does_not_loop():
    """Slot 0 says a = p, slot 1 says a = p and q: that q is always there, rather than p being a part of itself."""
    labels = Labels()
    a, b, p, q, r = labels.fresh(5)
    one, other = np.array([[a, a, b]]), np.array([[p, p, 0], [0, q, r]])
    labels.unify(one, other)
    assert_same_dim(labels, one, other)
    assert len(atoms(labels, one, other)) == 1


def test_freezing_a_refined_label_freezes_its_parts():
    labels = Labels()
    dim = labels.fresh_dim(4)
    parts = labels.split(dim, [2, 2])
    labels.freeze(dim[0, :1])
    assert int(labels.roots(parts[0][0, :1])[0]) == 0 and int(labels.roots(parts[1][0, :1])[0]) == 0
    assert kept_slots(labels, dim, set(atoms(labels, dim))) == [True, False, False, False]


# ---------------------------------------------------------------------------------------------------------- algebra


@st.composite
def programs(draw: st.DrawFn) -> list[tuple]:
    """A list of steps; numbers pick among the dims there are at that moment."""
    number = st.integers(0, 10**6)
    step = st.one_of(
        st.tuples(st.just("fresh"), st.sampled_from(SIZES)),
        st.tuples(st.just("unify"), number, number),
        st.tuples(st.just("split"), number, number),
        st.tuples(st.just("merge"), number, number),
        st.tuples(st.just("concat"), number, number),
        st.tuples(st.just("slice"), number, number),
        st.tuples(st.just("repeat"), number),
        st.tuples(st.just("freeze"), number, number),
    )
    return [("fresh", 4), ("fresh", 12), *draw(st.lists(step, min_size=2, max_size=14))]


class Machine:
    """Runs a program and notes what must be equal afterwards, whatever goes."""

    def __init__(self, program: list[tuple], *, swap: bool = False) -> None:
        self.labels = Labels()
        self.dims: list[Dim] = []
        self.equal: list[tuple[Dim, Dim]] = []
        self.rigid: list[Dim] = []
        self.swap = swap
        for name, *numbers in program:
            getattr(self, name)(*numbers)

    def pick(self, number: int) -> Dim:
        return self.dims[number % len(self.dims)]

    def fresh(self, size: int) -> None:
        self.dims.append(self.labels.fresh_dim(size))

    def unify(self, one: int, other: int) -> None:
        left = self.pick(one)
        same = [dim for dim in self.dims if dim.shape[1] == left.shape[1]]
        right = same[other % len(same)]
        self.labels.unify(*((right, left) if self.swap else (left, right)))
        self.equal.append((left, right))

    def split(self, one: int, other: int) -> None:
        dim = self.pick(one)
        divisors = [d for d in range(2, dim.shape[1]) if dim.shape[1] % d == 0]
        if divisors:
            outer = divisors[other % len(divisors)]
            parts = self.labels.split(dim, [outer, dim.shape[1] // outer])
            self.dims += parts
            self.equal.append((dim, self.labels.merge(parts)))

    def merge(self, one: int, other: int) -> None:
        left, right = self.pick(one), self.pick(other)
        if left.shape[1] * right.shape[1] <= 48:
            self.dims.append(self.labels.merge([left, right]))

    def concat(self, one: int, other: int) -> None:
        left, right = self.pick(one), self.pick(other)
        if left.shape[1] + right.shape[1] <= 48:
            self.dims.append(concat([self.labels.resolve(left), self.labels.resolve(right)]))

    def slice(self, one: int, other: int) -> None:
        dim = self.labels.resolve(self.pick(one))
        size = dim.shape[1]
        if size > 2:
            start = other % (size - 1)
            self.dims.append(dim[:, start : start + 2 + other % (size - start)])

    def repeat(self, one: int) -> None:
        dim = self.labels.resolve(self.pick(one))
        if dim.shape[1] <= 12:
            self.dims.append(np.repeat(dim, 2, axis=1))

    def freeze(self, one: int, other: int) -> None:
        dim = self.pick(one)
        start = other % dim.shape[1]
        part = dim[:, start : start + 1]
        self.labels.freeze_dim(part)
        self.rigid.append(part)


@settings(deadline=None, max_examples=100)
@given(programs())
def test_dims_that_were_made_one_keep_the_same_slots(program):
    machine = Machine(program)
    for one, other in machine.equal:
        assert_same_dim(machine.labels, one, other)
    for dim in machine.rigid:
        assert not atoms(machine.labels, dim)


@settings(deadline=None, max_examples=60)
@given(programs())
def test_settling_changes_nothing_and_never_leaves_a_label_on_a_whole_dim(program):
    machine = Machine(program)
    for dim in machine.dims:
        settled = machine.labels.resolve(dim)
        assert settled.shape[1] == dim.shape[1]
        assert np.array_equal(machine.labels.resolve(settled), settled)
        assert all((row > 0).any() and len(np.unique(row)) > 1 for row in settled)
        for column in settled.T:
            used = column[column > 0]
            assert len(np.unique(used)) == len(used)


@settings(deadline=None, max_examples=60)
@given(programs())
def test_unify_is_symmetric(program):
    """Whichever side is named first, the same slots of every dim stand or fall together, and the same are frozen."""
    one, other = Machine(program), Machine(program, swap=True)
    assert len(one.dims) == len(other.dims)
    for mine, theirs in zip(one.dims, other.dims, strict=True):
        found = [tied_slots(machine.labels, dim) for machine, dim in ((one, mine), (other, theirs))]
        assert found[0] == found[1]


def tied_slots(labels: Labels, dim: Dim) -> set[frozenset[int]]:
    """For each label of a dim the slots that go with it."""
    settled = labels.resolve(dim)
    return {frozenset(np.flatnonzero((settled == atom).any(axis=0)).tolist()) for atom in atoms(labels, dim)}
