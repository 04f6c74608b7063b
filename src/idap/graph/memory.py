"""Who changes whose memory: views and in-place operators make a value depend on more than the nodes it reads."""

from collections.abc import Mapping, Sequence


class Memory:
    """Which nodes share memory, and which change it.

    Args:
        effects: for each node, in execution order, the nodes whose memory its result may share, and those whose
            memory it changes.
    """

    def __init__(self, effects: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        self._order = {name: place for place, name in enumerate(effects)}
        self._roots: dict[str, frozenset[str]] = {}
        self._writers: dict[str, list[str]] = {}
        for name, (shares, writes) in effects.items():
            shared = frozenset[str]().union(*(self._roots[used] for used in shares))
            self._roots[name] = shared or frozenset([name])
            for root in frozenset[str]().union(*(self._roots[used] for used in writes)):
                self._writers.setdefault(root, []).append(name)

    def writers(self, name: str) -> set[str]:
        """The nodes that change what this node holds, before or after it is made."""
        return {writer for root in self._roots[name] for writer in self._writers.get(root, ())}

    def written(self, name: str) -> frozenset[str]:
        """The nodes that made the memory which this node changes."""
        return frozenset(root for root, writers in self._writers.items() if name in writers)

    def changed(self, names: Sequence[str], before: int) -> list[str]:
        """The nodes that change one of these after it was made and earlier than place `before`, in order."""
        found = {w for name in names for w in self.writers(name) if self._order[name] < self._order[w] < before}
        return sorted(found, key=self._order.__getitem__)
