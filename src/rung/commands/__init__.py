"""The commands: one file for each verb of the command line, whose function is also the public Python API."""
