"""Cards, hosts and links by name, and the cost model of kernels on them."""
