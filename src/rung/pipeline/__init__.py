"""What starts several runs."""
