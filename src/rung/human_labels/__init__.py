"""Labels of people: items and tasks, the database that keeps every click, statistics, and exchange formats.

`labeling` serves the page on top of it; `commands.climb` reads what people preferred.
"""
