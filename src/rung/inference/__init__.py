"""One way to get answers from a model behind a server."""
