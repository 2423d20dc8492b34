"""The command line: `main` parses the flags, each mode is a file with its own flags."""
