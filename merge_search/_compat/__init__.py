"""Uses of other libraries' internals, one module a library. A test fails when the library changes one of them."""
