"""Cards, hosts and links by name, and what kernels reach of their data sheets."""
