"""The stand-ins carry the names of test files, and have no tests: they are for the mixins only."""

collect_ignore = ["stand_ins"]
