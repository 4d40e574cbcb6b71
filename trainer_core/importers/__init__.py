"""Import of other trainers' configurations: a workflow, and a report of what was taken over and what was not.

One module per trainer with one table, `theirs -> (node, field, convert)`; registry.py lists them.
docs/coming-from.md is checked against the tables.
"""
