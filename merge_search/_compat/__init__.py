"""Uses of other libraries' internals, one module a library.

Each use has a test that fails when the library changes it.
"""
