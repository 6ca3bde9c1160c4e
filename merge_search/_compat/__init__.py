"""Undocumented parts of libraries that this project uses, one file a library.

Each has a test in `tests/library_internals` that fails when the library moves or changes them.
"""
