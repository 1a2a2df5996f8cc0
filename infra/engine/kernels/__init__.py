"""What compiled kernels are made of and kept with; arithmetic that is the same on every machine."""
