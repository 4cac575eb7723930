"""Commands that time kernels on the device at hand, and find their fastest blocks."""
