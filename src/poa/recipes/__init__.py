"""The recipes: configurations with source, command, hardware, time and expected result in their header."""
