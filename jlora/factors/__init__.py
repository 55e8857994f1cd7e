"""The mathematics of the factors' initial values: `random` draws them, `spectral` takes them from the kernel."""
