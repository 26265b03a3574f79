"""Pure functions on text and numbers: how an answer is scored, and how sure a score is."""
