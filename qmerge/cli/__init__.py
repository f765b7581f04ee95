"""The command line: click commands, output, progress."""
