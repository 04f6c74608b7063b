"""Labels that say which slots of tensor dimensions must be kept or removed together.

A *dim* is an integer array of shape (rows, size). Each entry is a label; a slot of the dimension is present if all
labels of its column are present. Label 0 is always present, and a dim without rows, shape (0, size), can't shrink.
Labels are joined (they are kept or removed together), frozen (they are kept), or refined: the label becomes "all of
these finer labels". Refinement turns the 64 outputs of a projection into 4 heads x 16 channels once a reshape has
shown this structure.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Dim = NDArray[np.int64]
Ids = NDArray[np.int64]


def constant_dim(size: int) -> Dim:
    """A dim whose slots are always present."""
    return np.zeros((0, size), dtype=np.int64)


class Labels:
    """Union-find over labels, with freezing and refinement; every operation takes whole arrays.

    Only atomic labels (not refined) are ever joined: `resolve` replaces refined labels by their parts first.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._frozen = np.ones(1, dtype=bool)
        self._why = np.zeros(1, dtype=np.int64)
        self._left = np.full(1, -1, dtype=np.int64)
        self._right = np.full(1, -1, dtype=np.int64)
        self._count = 1
        self._reasons = {"": 0}
        self._reason = 0

    def __len__(self) -> int:
        return self._count

    def because(self, reason: str) -> None:
        """Set the reason that is recorded for everything frozen from now on."""
        self._reason = self._reasons.setdefault(reason, len(self._reasons))

    def fresh(self, count: int) -> Ids:
        """New free labels, shape (count,)."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            extra = max(count, len(self._parent))
            old = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(old, old + extra)])
            self._frozen = np.concatenate([self._frozen, np.zeros(extra, dtype=bool)])
            self._why = np.concatenate([self._why, np.zeros(extra, dtype=np.int64)])
            self._left = np.concatenate([self._left, np.full(extra, -1, dtype=np.int64)])
            self._right = np.concatenate([self._right, np.full(extra, -1, dtype=np.int64)])
        return np.arange(start, self._count, dtype=np.int64)

    def fresh_dim(self, size: int) -> Dim:
        """A dim whose slots may be removed independently; a dim of one slot can't shrink."""
        return self.fresh(size)[None] if size > 1 else constant_dim(size)

    def roots(self, ids: Ids) -> Ids:
        """The representative of each label; 0 for frozen ones."""
        found = self._find(ids)
        return np.where(self._frozen[found], 0, found)

    def _find(self, ids: Ids) -> Ids:
        found = self._parent[ids]
        while True:
            further = self._parent[found]
            if (further == found).all():
                break
            self._parent[ids] = further
            found = further
        return found

    def _atoms(self, ids: Ids) -> Ids:
        """The atomic labels that these are made of, including frozen ones."""
        todo = self._find(np.unique(ids))
        found = [todo[:0]]
        while todo.size:
            refined = self._left[todo] >= 0
            found.append(todo[~refined])
            todo = self._find(np.unique([self._left[todo[refined]], self._right[todo[refined]]]))
        return np.unique(np.concatenate(found))

    def freeze(self, ids: Ids) -> None:
        """Keep these labels, and all labels that they are made of."""
        atoms = self._atoms(ids)
        atoms = atoms[~self._frozen[atoms]]
        self._frozen[atoms] = True
        self._why[atoms] = self._reason

    def reason(self, ids: Ids) -> str:
        """Why these labels can't be removed: the reason recorded for the first frozen one, "" if none is frozen."""
        atoms = self._atoms(ids[ids > 0])
        frozen = atoms[self._frozen[atoms] & (atoms > 0)]
        return list(self._reasons)[int(self._why[frozen[0]])] if frozen.size else ""

    def join(self, one: Ids, other: Ids) -> None:
        """Tie labels slot by slot, so that they are kept or removed together.

        A label that is joined with 0, or with a refined label, is frozen together with it.
        """
        pairs = np.stack([np.ravel(one), np.ravel(other)])
        while pairs.size:
            roots = self._find(pairs)
            pairs, roots = pairs[:, roots[0] != roots[1]], roots[:, roots[0] != roots[1]]
            # The same operator has just refined a label that is still refined here: too entangled to follow.
            rigid = (self._frozen[roots] | (self._left[roots] >= 0)).any(axis=0)
            if rigid.any():
                self.freeze(pairs[:, rigid].ravel())
                pairs = pairs[:, ~rigid]
            elif pairs.size:
                merged, first = np.unique(roots.max(axis=0), return_index=True)
                self._parent[merged] = roots.min(axis=0)[first]

    def _join_ascending(self, one: Ids, other: Ids) -> None:
        """Join free atomic labels; no label may occur twice on the same side."""
        low, high = np.minimum(one, other), np.maximum(one, other)
        self._parent[high] = low

    def refine(self, ids: Ids, parts: Sequence[Ids]) -> None:
        """Turn each atomic label into "all of its parts"; if a label occurs twice, the parts of both are tied."""
        if len(parts) == 1:
            self.join(ids, parts[0])
            return
        while ids.size:
            ids = self.roots(ids)
            unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
            for part in parts:
                self.join(part, part[first][inverse])
            ids = self.roots(ids)
            # A label that is frozen, already refined, or a part of a part is too entangled to follow.
            bad = (ids == 0) | (self._left[ids] >= 0) | np.isin(ids, self._atoms(np.stack(parts)))
            if not bad.any():
                self._assign(unique, [part[first] for part in parts])
                return
            self.freeze(np.concatenate([ids[bad], *(part[bad] for part in parts)]))
            ids, parts = ids[~bad], [part[~bad] for part in parts]

    def _assign(self, ids: Ids, parts: Sequence[Ids]) -> None:
        left, right = parts[0], parts[1]
        for part in parts[2:]:
            nested = self.fresh(len(ids))
            self._left[nested], self._right[nested] = right, part
            right = nested
        self._left[ids], self._right[ids] = left, right

    def resolve(self, dim: Dim) -> Dim:
        """The same dim in terms of atomic labels, without duplicates in a column and without empty rows."""
        if not dim.size:
            return dim[:0]
        rows = self.roots(dim)
        if len(rows) == 1 and not (self._left[rows[0]] >= 0).any():
            return self._resolve_row(rows)
        while True:
            refined = (rows > 0) & (self._left[rows] >= 0)
            if not refined.any():
                break
            extra = np.where(refined, self._right[rows], 0)
            rows = self.roots(np.where(refined, self._left[rows], rows))
            rows = np.concatenate([rows, self.roots(extra)[refined.any(axis=1)]])
        for i in range(1, len(rows)):
            rows[i][(rows[:i] == rows[i]).any(axis=0)] = 0
        rows = rows[(rows > 0).any(axis=1)]
        # A label that a whole dimension depends on can't be removed: nothing would be left of the dimension.
        whole = [row[0] for row in rows if row[0] > 0 and (row == row[0]).all()]
        if whole:
            self.freeze(np.array(whole))
            return self.resolve(rows)
        return rows

    def _resolve_row(self, rows: Dim) -> Dim:
        """`resolve` for the most common dim: one row of atomic labels."""
        first = rows[0, 0]
        if not (rows[0] == first).all():
            return rows
        if first > 0:
            self.freeze(rows[0, :1])
        return rows[:0]

    def freeze_dim(self, dim: Dim) -> None:
        """Keep every slot of this dim."""
        if dim.size:
            self.freeze(dim.ravel())

    def unify(self, one: Dim, other: Dim) -> None:
        """Make two dims of equal size one dimension: their slots are kept or removed together."""
        if one.shape[1] != other.shape[1]:
            raise AssertionError(f"dims of sizes {one.shape[1]} and {other.shape[1]} can't be one dimension")
        one, other = self.resolve(one), self.resolve(other)
        if len(one) == len(other) == 1 and _is_ascending(one[0]) and _is_ascending(other[0]):
            self._join_ascending(one[0], other[0])
            return
        one, other = _without_common(one, other)
        one, other = self._join_alike(one, other)
        if not len(one) or not len(other):
            self.freeze_dim(one)
            self.freeze_dim(other)
        elif len(one) == 1 or len(other) == 1:
            single, several = (one, other) if len(one) == 1 else (other, one)
            self._refine_row(single[0], several)
        else:
            self._unify_by_digits(one, other)

    def _join_alike(self, one: Dim, other: Dim) -> tuple[Dim, Dim]:
        """Join the rows that vary in the same way; returns the other rows of both dims."""
        patterns = [_pattern(row) for row in other]
        left, taken = [], set()
        for row in one:
            mine = _pattern(row)
            match = next((j for j, p in enumerate(patterns) if j not in taken and np.array_equal(mine, p)), None)
            if match is None:
                left.append(row)
                continue
            taken.add(match)
            self.join(row[row > 0], other[match][row > 0])
        rest = [row for j, row in enumerate(other) if j not in taken]
        size = one.shape[1]
        return (
            self.resolve(np.array(left, dtype=np.int64).reshape(-1, size)),
            self.resolve(np.array(rest, dtype=np.int64).reshape(-1, size)),
        )

    def _refine_row(self, row: Ids, parts: Dim) -> None:
        bare = row == 0
        self.freeze(parts[:, bare].ravel())
        empty = (parts == 0).all(axis=0)
        self.freeze(row[empty])
        both = ~bare & ~empty
        if np.intersect1d(row[both], parts[:, both]).size:  # a label that is its own part: too entangled to follow
            self.freeze(np.concatenate([row[both], parts[:, both].ravel()]))
            return
        for pattern in np.unique((parts[:, both] > 0).T, axis=0):
            slots = both & ((parts > 0) == pattern[:, None]).all(axis=0)
            self.refine(row[slots], [part[slots] for part in parts[pattern]])

    def _unify_by_digits(self, one: Dim, other: Dim) -> None:
        """Unify products of different factors, such as (4, 2) and (2, 4), by splitting both at every factor."""
        digits = _common_digits([*one, *other], one.shape[1])
        if digits is None:
            self.freeze_dim(one)
            self.freeze_dim(other)
            return
        for mine, theirs in zip(self.split(one, digits), self.split(other, digits), strict=True):
            self.unify(mine, theirs)

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """One dimension seen as several, in row-major order; their sizes multiply to its size."""
        found: list[list[Ids]] = [[] for _ in sizes]
        for row in self.resolve(dim):
            for axis, part in self._split_row(row.reshape(tuple(sizes))):
                found[axis].append(part)
        return [
            self.resolve(np.array(rows, dtype=np.int64).reshape(-1, size))
            for rows, size in zip(found, sizes, strict=True)
        ]

    def _split_row(self, grid: Ids) -> list[tuple[int, Ids]]:
        varying = [axis for axis in range(grid.ndim) if grid.shape[axis] > 1 and (np.diff(grid, axis=axis) != 0).any()]
        if not varying:
            self.freeze(grid.ravel()[:1])
            return []
        corner = grid[tuple(slice(None) if axis in varying else 0 for axis in range(grid.ndim))]
        if len(varying) == 1:
            return [(varying[0], corner)]
        parts = [self.fresh(size) for size in corner.shape]
        at = [part[index].ravel() for part, index in zip(parts, np.indices(corner.shape), strict=True)]
        self.refine(corner.ravel(), at)
        return list(zip(varying, parts, strict=True))

    def merge(self, dims: Sequence[Dim]) -> Dim:
        """Several dimensions seen as one, in row-major order."""
        sizes = tuple(dim.shape[1] for dim in dims)
        total = int(np.prod(sizes))
        rows = []
        for axis, dim in enumerate(dims):
            place = [1] * len(sizes)
            place[axis] = sizes[axis]
            rows += [np.broadcast_to(row.reshape(place), sizes).reshape(total) for row in self.resolve(dim)]
        return np.array(rows, dtype=np.int64).reshape(-1, total)


def concat(dims: Sequence[Dim]) -> Dim:
    """Dims one after the other, as one dim."""
    height = max((len(dim) for dim in dims), default=0)
    padded = [np.concatenate([dim, np.zeros((height - len(dim), dim.shape[1]), np.int64)]) for dim in dims]
    return np.concatenate(padded, axis=1)


def _is_ascending(row: Ids) -> bool:
    """Whether every slot has a label, and a larger one than the slot before it."""
    return bool(row[0] > 0 and (row[1:] > row[:-1]).all())


def _without_common(one: Dim, other: Dim) -> tuple[Dim, Dim]:
    """Remove from each column the labels that both sides have there."""
    one, other = one.copy(), other.copy()
    for mine in one:
        for theirs in other:
            same = (mine == theirs) & (mine > 0)
            mine[same] = 0
            theirs[same] = 0
    return one[(one > 0).any(axis=1)], other[(other > 0).any(axis=1)]


def _pattern(row: Ids) -> Ids:
    """How a row varies, whatever its labels are: each label's first place, -1 where there is none."""
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    return np.where(row > 0, first[inverse], -1)


def _common_digits(rows: Sequence[Ids], size: int) -> list[int] | None:
    """The mixed-radix digits that all rows have in common, outermost first; None if there are none."""
    cuts = {1, size}
    for row in rows:
        change = np.flatnonzero(np.diff(row))
        run = int(change[0]) + 1 if change.size else size
        values = len(np.unique(row))
        if (row == 0).any() or not np.array_equal(_pattern(row) // run, (np.arange(size) // run) % values):
            return None
        cuts |= {run, run * values}
    ordered = sorted(cuts)
    if any(larger % smaller for smaller, larger in itertools.pairwise(ordered)):
        return None
    digits = [larger // smaller for smaller, larger in itertools.pairwise(ordered)][::-1]
    return digits if len(digits) > 1 else None
