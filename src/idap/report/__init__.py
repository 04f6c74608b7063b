"""Show runs to people: the HTML page of a run, a comparison of runs, and displays for notebooks."""
