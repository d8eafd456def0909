"""Random attacks from processes of their own: damaged files, wrong uses, pins of what cannot run, caches that cannot be kept."""
