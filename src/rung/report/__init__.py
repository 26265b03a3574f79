"""What a person reads about a run: an HTML page and lines for the terminal. Reads run folders and nothing else."""
