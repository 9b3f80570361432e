"""The benchmark of the backend "cupy": its kernels and steps beside what a user would otherwise run on the same GPU."""
