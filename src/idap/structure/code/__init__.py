"""How the code of a model follows a cut: its sizes, new values for its ints, new code where it must be."""
