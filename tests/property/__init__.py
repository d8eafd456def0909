"""Random graphs and machines, against the literal port and against invariants."""
