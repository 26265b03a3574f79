"""Getting answers: one way to ask a model in this process or behind a server, one way to choose, one journal."""
