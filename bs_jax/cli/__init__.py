"""The command line: flags, and one mode of main.py a file."""
