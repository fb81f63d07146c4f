"""What tools/bench runs. One module a group of cases; docs/benchmarks/how.md says how they fit together."""
