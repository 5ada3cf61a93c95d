"""What a run must survive: one test per row of docs/reliability.md, named `test_row_NN_...`.

A package, so that its files may share names with those of tests/; the fixtures are in
tests/conftest.py. Long ones carry `pytest.mark.faults` and run by `make faults`.
"""
