"""Golden split decisions: recorded cases, traces, and their comparison."""
