"""Initial values of the factors, mathematics only: `random` draws them, `spectral` takes them from the kernel."""
