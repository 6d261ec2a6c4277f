"""Planted defects: what the trainer's tests have to find. `python -m tests.mutants` plants each one alone.

`listed` names the lists by area; `nursery` is the process that runs the tests, `harness` the one that plants and judges.
"""
