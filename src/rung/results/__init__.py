"""What the verbs return: typed values that mirror the JSON that `--json` prints and that run folders hold.

Each is a pydantic model whose `to_json` gives back what it was made of, fields of an objective's own included, so that
reading a folder and writing it again loses nothing. Results hold numbers and words alone: no tensors, no open files.
They are made by `rung.scoring`, `rung.evaluation` and `rung.commands`, and read by the terminal, the report and Python
programs.
"""
