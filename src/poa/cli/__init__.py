"""The command line: one small module for each command, which parses, calls one function and prints."""
