"""Compiled loops: a traced element-wise function becomes one C++ loop. `kernel.compile_kernel` is the door."""
